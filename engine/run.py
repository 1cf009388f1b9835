"""What the scripts call: `train` and `test` of one recipe. Alone in the engine, this file imports the networks."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import timm.utils
import torch
import yaml
from torch import nn

from models import create_model
from models.released import load_released

from . import checkpoint, dist, log
from .config import LOCAL_FIELDS, MODEL_FIELDS, Config, load, plain
from .data.image import create_data
from .dist import Dist
from .errors import UserError
from .log import RunLog, logger
from .loop import NO_BEST, Trainer, evaluate
from .optim import base_lr, create_optimizer, effective_batch, total_epochs


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
        _exit(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"{error.filename}: {error.strerror}")
    finally:
        dist.teardown()


def _exit(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _train(recipe: Path, argv: Sequence[str]) -> None:
    cfg = load(recipe, argv)
    if cfg.checkpoint:
        raise UserError("--checkpoint is for test.py; to go on with a run give --resume")
    folder, path = _find_run(cfg)
    state = _read_run(path) if path else None
    continues = state is not None and folder.resolve() == path.parent.resolve()
    if continues:
        cfg = load(recipe, argv, state["config"])
    here = _setup(cfg)
    timm.utils.random_seed(cfg.seed)
    data = create_data(cfg, here)
    model = build_model(cfg).to(here.device)
    trainer = Trainer(cfg, here, model, create_optimizer(cfg, model), data)
    if state:
        _restore(cfg, trainer, state, path)
        if not continues:
            trainer.best = dict(NO_BEST)  # of the run in the other folder
    folder = folder or Path(dist.from_main(f"output/{Path(cfg.config).stem}/{time.strftime('%Y%m%d-%H%M%S')}"))
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        f"{cfg.model}: {parameters:,} parameters, T = {cfg.time_steps}, on {here.world_size} x {here.device.type}; "
        f"effective batch {effective_batch(cfg)}, learning rate {base_lr(cfg):.3g}\nwriting to {folder}"
    )
    if trainer.epoch >= total_epochs(cfg):
        logger.info(f"nothing is left to train: {trainer.epoch} of {total_epochs(cfg)} epochs are done")
    with _records(cfg, here, folder, trainer.epoch) as run_log:
        trainer.fit(run_log, lambda is_best: _save(cfg, here, folder, trainer, is_best))
    logger.info(f"best top-1 {trainer.best['test_top1']:.2f} %; checkpoints, metrics and curves are in {folder}")


def _find_run(cfg: Config) -> tuple[Path | None, Path | None]:
    """The folder to write to (None: a new one) and the checkpoint to go on from (None: from the start)."""
    folder, path = cfg.output_dir and Path(cfg.output_dir), None
    if cfg.resume == "auto":
        if not folder:
            raise UserError("--resume auto needs --output-dir, the folder of the run to go on with")
        path = folder / "last.pt" if (folder / "last.pt").exists() else None
    elif cfg.resume:
        path = Path(cfg.resume)
        folder = folder or path.parent
    last = folder and folder / "last.pt"
    if last and last.exists() and not (path and path.exists() and path.samefile(last)):
        raise UserError(f"{folder} holds a run already: go on with --resume auto, or choose another --output-dir")
    return folder, path


def _read_run(path: Path) -> dict:
    state = checkpoint.read(path)
    if state["format"] != "qkformer":
        raise UserError(f"--resume {path}: not a checkpoint of this project, so there is no run to go on with")
    return state


def _differences(cfg: Config, state: dict, keys: Sequence[str]) -> list[tuple[str, object, object]]:
    """(key, our value, the checkpoint's value) of each setting among `keys` that differs."""
    ours, theirs = plain(cfg), state["config"]
    return [(key, ours[key], theirs.get(key)) for key in keys if ours[key] != theirs.get(key)]


def _restore(cfg: Config, trainer: Trainer, state: dict, path: Path) -> None:
    for key, ours, theirs in _differences(cfg, state, (*MODEL_FIELDS, "opt")):
        raise UserError(f"--resume {path}: {key} is {theirs!r} there and {ours!r} here")
    try:
        trainer.restore(state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"--resume {path}: {error}") from None
    logger.info(f"resumed {path} after epoch {trainer.epoch}")


def _setup(cfg: Config) -> Dist:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    here = dist.setup(cfg.device)
    log.setup_console(here.is_main)
    return here


@contextlib.contextmanager
def _records(cfg: Config, here: Dist, folder: Path, first_epoch: int) -> Iterator[RunLog | None]:
    if not here.is_main:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    about = folder / "run.json"
    starts = json.loads(about.read_text()) if about.exists() else []
    starts.append({**log.provenance(), "first_epoch": first_epoch, "config": plain(cfg)})
    about.write_text(json.dumps(starts, indent=2) + "\n")
    settings = plain(cfg, without=("config", "output_dir", "resume", "checkpoint"))
    (folder / "config.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
    run_log = RunLog(folder, first_epoch)
    try:
        yield run_log
    finally:
        run_log.close()


def _save(cfg: Config, here: Dist, folder: Path, trainer: Trainer, is_best: bool) -> None:
    if here.is_main:
        content = trainer.state() | {"config": plain(cfg, without=LOCAL_FIELDS)}
        for name in ("best.pt", "last.pt") if is_best else ("last.pt",):  # killed in between, the epoch is run again
            checkpoint.save(folder / name, content)


def _test(recipe: Path, argv: Sequence[str]) -> None:
    cfg = load(recipe, argv)
    if not cfg.checkpoint:
        raise UserError("test.py needs --checkpoint FILE, such as best.pt in the folder of a run")
    state = checkpoint.read(cfg.checkpoint)
    is_ours = state["format"] == "qkformer"
    if is_ours:
        cfg = load(recipe, argv, state["config"])
    here = _setup(cfg)
    for key, ours, theirs in _differences(cfg, state, MODEL_FIELDS) if is_ours else ():
        logger.warning(f"{key} is {ours!r}, where the checkpoint recorded {theirs!r}")
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
        raise UserError(f"checkpoint {path}: {error}") from None


def _report(cfg: Config, result: dict, gallery: log.Gallery) -> None:
    logger.info(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} "
        f"on {result['count']} samples"
    )
    folder = Path(cfg.output_dir or Path(cfg.checkpoint).parent)
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / "test.json", folder / "predictions.png"
    numbers.write_text(json.dumps({**result, **plain(cfg), **log.provenance()}, indent=2) + "\n")
    gallery.draw(picture)
    logger.info(f"written: {numbers}, {picture}")
