"""What the scripts call: `train` and `test` of one recipe. Alone in the engine, this file imports the networks."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import timm.utils
import torch
from torch import nn

from models import create_model
from models.released import load_released

from . import checkpoint, dist, log
from .config import MODEL_FIELDS, Config, load, to_yaml
from .data.image import create_data
from .dist import Dist
from .errors import UserError
from .log import RunLog, logger
from .loop import Trainer, evaluate
from .optim import base_lr, create_optimizer, effective_batch


def train(recipe: Path) -> None:
    """Train as the recipe and the command line say; the script's whole body."""
    _main(_train, recipe)


def test(recipe: Path) -> None:
    """Evaluate `--checkpoint` as the recipe and the command line say; the script's whole body."""
    _main(_test, recipe)


def build_model(cfg: Config) -> nn.Module:
    """The network that `cfg` names.

    Raises:
        UserError: unknown name, or settings that do not go together.
    """
    settings = {key: getattr(cfg, key) for key in MODEL_FIELDS[1:]}
    settings = {key: value for key, value in settings.items() if value is not None}
    try:
        return create_model(cfg.model, **settings, lif_backend=cfg.lif_backend)
    except ValueError as error:
        raise UserError(str(error)) from None


def _main(body: Callable[[Path, Sequence[str]], None], recipe: Path) -> None:
    try:
        body(recipe, sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        dist.teardown()


def _train(recipe: Path, argv: Sequence[str]) -> None:
    cfg = load(recipe, argv)
    if cfg.checkpoint:
        raise UserError("--checkpoint is for test.py; to go on with a run give --resume")
    here = _setup(cfg)
    timm.utils.random_seed(cfg.seed)
    data = create_data(cfg, here)
    model = build_model(cfg).to(here.device)
    trainer = Trainer(cfg, here, model, create_optimizer(cfg, model), data)
    folder = Path(dist.from_main(cfg.output_dir or f"output/{Path(cfg.config).stem}/{time.strftime('%Y%m%d-%H%M%S')}"))
    _resume(cfg, folder, trainer)
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        f"{cfg.model}: {parameters:,} parameters, T = {cfg.time_steps}, on {here.world_size} x {here.device.type}; "
        f"effective batch {effective_batch(cfg)}, learning rate {base_lr(cfg):.3g}\nwriting to {folder}"
    )
    with _records(cfg, here, folder, trainer.epoch) as run_log:
        trainer.fit(run_log, lambda is_best: _save(cfg, here, folder, trainer, is_best))
    logger.info(f"best top-1 {trainer.best['test_top1']:.2f} %; checkpoints, metrics and curves are in {folder}")


def _setup(cfg: Config) -> Dist:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    here = dist.setup(cfg.device)
    log.setup_console(here.is_main)
    return here


def _resume(cfg: Config, folder: Path, trainer: Trainer) -> None:
    last = folder / "last.pt"
    if not cfg.resume and last.exists():
        raise UserError(f"{folder} holds a run already: go on with --resume auto, or choose another --output-dir")
    path = last if cfg.resume == "auto" else cfg.resume
    if not path or (cfg.resume == "auto" and not last.exists()):
        return
    state = checkpoint.read(path)
    if state["format"] != "qkformer":
        raise UserError(f"--resume {path}: not a checkpoint of this project, so there is no run to go on with")
    _refuse_other_network(cfg, state["config"], path)
    try:
        trainer.restore(state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"--resume {path}: {' '.join(str(error).split())}") from None
    logger.info(f"resumed {path} after epoch {trainer.epoch}")


def _refuse_other_network(cfg: Config, recorded: dict, path: str | Path) -> None:
    for key in MODEL_FIELDS:
        ours, theirs = getattr(cfg, key), recorded.get(key)
        if (list(ours) if isinstance(ours, tuple) else ours) != theirs:
            raise UserError(f"--resume {path}: {key} is {theirs!r} there and {ours!r} here")


@contextlib.contextmanager
def _records(cfg: Config, here: Dist, folder: Path, first_epoch: int) -> Iterator[RunLog | None]:
    if not here.is_main:
        yield None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yml").write_text(to_yaml(cfg))
        (folder / "run.json").write_text(json.dumps(log.provenance(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output-dir {folder}: {error.strerror}") from None
    run_log = RunLog(folder, first_epoch)
    try:
        yield run_log
    finally:
        run_log.close()


def _save(cfg: Config, here: Dist, folder: Path, trainer: Trainer, is_best: bool) -> None:
    if here.is_main:
        recorded = {key: value for key, value in json.loads(json.dumps(vars(cfg))).items() if key != "config"}
        for name in ("best.pt", "last.pt") if is_best else ("last.pt",):  # killed in between, the epoch is run again
            checkpoint.save(folder / name, trainer.state() | {"config": recorded})


def _test(recipe: Path, argv: Sequence[str]) -> None:
    cfg = load(recipe, argv)
    if not cfg.checkpoint:
        raise UserError("test.py needs --checkpoint FILE, such as best.pt in the folder of a run")
    state = checkpoint.read(cfg.checkpoint)
    if state["format"] == "qkformer":
        recorded = {key: value for key, value in state["config"].items() if key in MODEL_FIELDS}
        cfg = load(recipe, argv, recorded)
    here = _setup(cfg)
    data = create_data(cfg, here, train=False)
    model = build_model(cfg).to(here.device)
    _load_weights(model, state, cfg.checkpoint)
    gallery = log.Gallery(data.classes, cfg.mean, cfg.std)
    result = evaluate(cfg, here, model, data.test, on_batch=gallery.add)
    if here.is_main:
        _report(cfg, result, gallery)


def _load_weights(model: nn.Module, state: dict, path: str) -> None:
    try:
        if state["format"] == "qkformer":
            model.load_state_dict(state["state_dict"])
        else:
            load_released(model, state["state_dict"])
    except (ValueError, RuntimeError) as error:
        raise UserError(f"checkpoint {path}: {' '.join(str(error).split())}") from None


def _report(cfg: Config, result: dict, gallery: log.Gallery) -> None:
    folder = Path(cfg.output_dir or Path(cfg.checkpoint).parent)
    settings = {key: getattr(cfg, key) for key in (*MODEL_FIELDS, "dataset", "checkpoint")}
    numbers, picture = folder / "test.json", folder / "predictions.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps({**result, **settings, **log.provenance()}, indent=2) + "\n")
        gallery.draw(picture)
    except OSError as error:
        raise UserError(f"cannot write the results to {folder}: {error.strerror}") from None
    logger.info(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} "
        f"on {result['count']} samples\nwritten: {numbers}, {picture}"
    )
