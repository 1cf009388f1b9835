"""What the scripts call: `train` and `test` of one recipe. Alone in the engine, this file imports the networks."""

import contextlib
import dataclasses
import math
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from pkgutil import resolve_name

import timm.utils
import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from models import create_model
from models.backends import triton_problem
from models.neuron import silent_layers
from models.released import identify, load_released

from . import checkpoint, log, published, results, world
from .cli import StopRequest, UserError, short, spare_children
from .config import EVENT_DATASETS, FIELDS, LOCAL_FIELDS, MODEL_FIELDS, Config, load, plain
from .data import event, image
from .data.loaders import Data
from .log import logger
from .optim import base_lr, batch_advice, create_optimizer, effective_batch, total_epochs
from .pictures import Gallery
from .run_dir import (
    checkpoint_to_test,
    differences,
    find_run,
    recorded_settings,
    records,
    runs_of,
    save,
    warn_of_seen,
    writing_to,
)
from .trainer import NO_BEST, Trainer, evaluate
from .world import World


@world.membership()
def train(recipe: Path) -> None:
    """Train as the recipe and the command line say; the script's whole body."""
    _train(recipe, sys.argv[1:])


@world.membership()
def test(recipe: Path, meter: str) -> None:
    """Evaluate `--checkpoint` as the recipe and the command line say; the script's whole body.

    Args:
        meter: "module:name" of the meter for `--energy`; a name, because analyses import the engine.
    """
    _test(recipe, sys.argv[1:], meter and resolve_name(meter))


def build_model(cfg: Config) -> nn.Module:
    """The network that `cfg` names.

    Raises:
        UserError: unknown name, or settings that do not go together.
    """
    settings = {key: getattr(cfg, key) for key in MODEL_FIELDS[1:]}
    settings = {key: value for key, value in settings.items() if value is not None}
    try:
        model = create_model(cfg.model, **settings, drop_path=cfg.drop_path, lif_backend=cfg.lif_backend)
        model.set_spike_packing(cfg.pack_spikes)
    except ValueError as error:
        raise UserError(str(error)) from None
    model.set_grad_checkpointing(cfg.grad_checkpointing)
    return model.to(memory_format=torch.channels_last) if cfg.channels_last else model


def create_data(cfg: Config, here: World, train: bool = True) -> Data:
    """The loaders of images or of event frames; raises `UserError` as they do."""
    return (event if cfg.dataset in EVENT_DATASETS else image).create_data(cfg, here, train)


def _train(recipe: Path, argv: Sequence[str]) -> None:
    cfg = load(recipe, argv, validate=False)
    if cfg.eval:
        _test(recipe, argv, None)
        return
    if cfg.checkpoint:
        raise UserError("--checkpoint is for test.py; to go on with a run give --resume")
    if cfg.energy:
        raise UserError("--energy is for test.py")
    if cfg.finetune and cfg.resume not in (None, "auto"):
        raise UserError("--finetune starts a run from weights, and --resume goes on with one: choose one")
    here = setup(cfg)
    _require_gpu(cfg, here)
    folder, path, state = find_run(cfg, here)
    is_ours = bool(state) and state["format"] == "qkformer"
    continues = is_ours and folder.resolve() == path.parent.resolve()
    cfg = recorded_settings(cfg, recipe, argv, path, state) if continues else load(recipe, argv)
    for key, ours, theirs in differences(cfg, state, (*MODEL_FIELDS, "opt")) if is_ours else ():
        raise UserError(f"--resume {path}: {key} is {short(theirs)} there and {ours!r} here")
    _require_equal_settings(cfg)
    timm.utils.random_seed(cfg.seed)
    data = create_data(cfg, here)
    if path or cfg.finetune:
        warn_of_seen(data, Path(path or cfg.finetune))
    _agree_on_triton(cfg, here)
    model = build_model(cfg).to(here.device)
    if state and not is_ours:
        load_weights(cfg, model, state, path)
        _warn_of_other_network(cfg, state, path)
    elif cfg.finetune and not state:
        weights = checkpoint.read(cfg.finetune)
        load_weights(cfg, model, weights, cfg.finetune, new_head=True)
        _warn_of_other_network(cfg, weights, cfg.finetune)
    if cfg.sync_bn:
        model = world.sync_batchnorm(model, here.device)
    trainer = Trainer(cfg, here, model, create_optimizer(cfg, model), data)
    if state:
        _restore(cfg, trainer, state, path)
        if not continues:
            trainer.best = dict(NO_BEST)  # of the run in the other folder
    folder = folder or Path(world.from_main(str(runs_of(cfg) / time.strftime("%Y%m%d-%H%M%S"))))
    _announce(cfg, here, trainer, folder)
    watch = () if cfg.compile else (warn_of_silence,)  # which would compile the network once more
    with StopRequest() as stop, writing_to(folder), records(cfg, here, folder, data, trainer.epoch) as run_log:
        trainer.fit(run_log, lambda is_best: save(cfg, here, folder, trainer, is_best), stop, *watch)
    logger.info(f"best top-1 {trainer.best['test_top1']:.2f} %; checkpoints, metrics and curves are in {folder}")


def _require_equal_settings(cfg: Config) -> None:
    """Raises `UserError` if the processes were started with different settings: they would wait for each other."""
    first, *others = world.gather([plain(cfg, without=LOCAL_FIELDS)])
    for other in others:
        for key in (key for key in first if first[key] != other[key]):
            raise UserError(f"{key} is {first[key]!r} in one process and {other[key]!r} in another: start all alike")


def _require_gpu(cfg: Config, here: World) -> None:
    """Raise `UserError` for training flags that need a GPU where there is none."""
    if cfg.cuda_graphs and (here.device.type == "cpu" or here.world_size > 1):
        raise UserError(
            f"--cuda-graphs needs one process on a GPU and this is {here.world_size} x {here.device.type}: leave it out"
        )
    if cfg.pack_spikes and cfg.lif_backend == "auto" and here.device.type == "cpu":
        raise UserError("--pack-spikes needs the Triton kernels, and they a GPU: leave it out")


def _agree_on_triton(cfg: Config, here: World) -> None:
    """Test the Triton kernels before the network needs them: on one rank of each machine first, which fills the cache.

    Raises:
        UserError: ranks disagree, and would wait for each other in different collectives; or a flag needs the kernels.
    """
    may_run = cfg.lif_backend == "triton" or (cfg.lif_backend == "auto" and here.device.type == "cuda")
    is_asked = may_run and not cfg.compile
    problem = world.in_turns(lambda: triton_problem() if is_asked else "is not chosen by the flags")
    problems = world.gather([problem])
    failed = {rank: problem for rank, problem in enumerate(problems) if problem}
    if 0 < len(failed) < len(problems):
        reason = next(iter(failed.values())).rpartition("; ")  # (reason, separator, what one process can do)
        raise UserError(
            f"ranks disagree: lif_backend='triton' {reason[0] or reason[2]} on rank {', '.join(map(str, failed))} of "
            f"{len(problems)}; start every rank with --lif-backend cupy or torch"
        )
    if problem and is_asked and cfg.lif_backend == "auto" and (cfg.cuda_graphs or cfg.pack_spikes):
        flag = "--cuda-graphs" if cfg.cuda_graphs else "--pack-spikes"
        raise UserError(f"{flag} needs the Triton kernels, and lif_backend='triton' {problem}")
    if not here.is_main:
        warnings.filterwarnings("ignore", "lif_backend='auto'")  # rank 0 prints why it does without Triton


def _announce(cfg: Config, here: World, trainer: Trainer, folder: Path) -> None:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    logger.info(
        f"{cfg.model}: {parameters:,} parameters, T = {cfg.time_steps}, on {here.world_size} x {here.device.type}; "
        f"effective batch {effective_batch(cfg)}, learning rate {base_lr(cfg):.3g}\nwriting to {folder}"
    )
    if advice := batch_advice(cfg):
        logger.warning(f"warning: {advice}")
    if trainer.epoch >= total_epochs(cfg):
        logger.info(f"nothing is left to train: {trainer.epoch} of {total_epochs(cfg)} epochs are done")


def _restore(cfg: Config, trainer: Trainer, state: dict, path: Path) -> None:
    if state["format"] == "qkformer":
        try:
            trainer.restore(state)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"--resume {path}: cannot be taken up ({type(error).__name__}: {error})") from None
    else:
        trainer.epoch = state["epoch"] + 1
        logger.warning(f"{path}: weights and epoch are taken over, and {cfg.opt} starts anew")
    step = f" and step {trainer.steps_done} of the next" if trainer.steps_done else ""
    logger.info(f"resumed {path} after epoch {trainer.epoch}{step}")


def _warn_of_other_network(cfg: Config, state: dict, path: Path | str) -> None:
    """Weights fit into networks that compute something else with them."""
    if state["format"] == "qkformer":
        theirs = state["config"]
    else:
        theirs = {"ssa_membrane": "released" if cfg.residual == "sew" else "per_sample"}
        theirs |= {"time_steps": getattr(state.get("args"), "time_step", cfg.time_steps)}
    for key in ("ssa_membrane", "residual", "time_steps", "attention"):
        if key in theirs and theirs[key] != plain(cfg)[key]:
            logger.warning(
                f"warning: {path} was trained with {key} = {short(theirs[key])}, and {key} is {plain(cfg)[key]!r} here"
            )


@torch.inference_mode()
def warn_of_silence(model: nn.Module, images: Tensor) -> None:
    """Say so if whole layers do not spike on any of the images: nothing passes them, and nothing behind them learns."""
    model.eval()
    if names := silent_layers(model, images):
        more = f" and {len(names) - 3} more layers" if len(names) > 3 else ""
        logger.warning(
            f"warning: no neuron of {', '.join(names[:3])}{more} spiked on {len(images)} test samples; if this does "
            "not pass, lower lr or start from other weights"
        )


def setup(cfg: Config) -> World:
    """Set up threads, processes, device, its arithmetic and console as `cfg` says."""
    spare_children()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    here = world.setup(cfg.device)
    world.set_arithmetic(cfg)
    if here.device.type == "cpu" and cfg.lif_backend in ("cupy", "triton") and torch.cuda.is_available():
        raise UserError(f"--lif-backend {cfg.lif_backend} computes on a GPU, and --device is cpu: use auto or torch")
    log.setup_console(here.is_main)
    if here.device.type == "cpu" and "fp16" in (cfg.amp, cfg.eval_amp):
        logger.info("fp16 does not pay on a CPU: computing in float32 (--amp bf16 is another choice)")
    return here


def _test(recipe: Path, argv: Sequence[str], meter: Callable[[nn.Module], AbstractContextManager] | None) -> None:
    cfg = load(recipe, argv, validate=False)
    if cfg.energy and (not meter or cfg.compile):
        raise UserError("--energy is for test.py, and does not go together with --compile")
    here = setup(cfg)
    path = world.from_main(checkpoint_to_test(cfg) if here.is_main else None)
    state = checkpoint.read(path)
    cfg = settings_of(state, path, recipe, argv)
    folder = Path(cfg.output_dir or path.parent)
    with writing_to(folder):  # better known now than behind the evaluation
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    data = create_data(cfg, here, train=False)
    warn_of_seen(data, path)
    membranes, figures = results.membranes(cfg), published.accuracies(cfg, recipe.parent)
    logger.info(
        f"evaluating {path} as {cfg.model}, T = {cfg.time_steps}, at {cfg.input_size} x {cfg.input_size} pixels, in "
        f"batches of {cfg.eval_batch_size or cfg.batch_size}, ssa_membrane {' and '.join(membranes)}"
    )
    _agree_on_triton(cfg, here)
    gallery, found, energy = Gallery(data.classes, data.show), {}, None
    for membrane in membranes:
        model = build_model(dataclasses.replace(cfg, ssa_membrane=membrane)).to(here.device)
        load_weights(cfg, model, state, path)
        if cfg.compile:
            model.compile()
        is_first = not found
        with meter(model) if cfg.energy and is_first else contextlib.nullcontext() as measured:
            found[membrane] = evaluate(cfg, here, model, data.test, on_batch=gallery.add if is_first else None)
        if not math.isfinite(found[membrane]["loss"]):
            raise UserError(
                f"{path}: its answers are not finite; if they are in float32 (--eval-amp off), take another"
            )
        results.tell(cfg, membrane, found[membrane], figures)
        if measured:
            energy = measured.report(world.gather)
            logger.info(energy.totals())
            if paper := published.energy_mj(cfg, recipe.parent):
                logger.info(f"published: {paper:.2f} mJ (paper)")
    if not here.is_main:
        return
    with writing_to(folder):
        results.write(cfg, folder, found, figures, gallery, energy)


def settings_of(state: dict, path: Path, recipe: Path, argv: Sequence[str]) -> Config:
    """How to evaluate this checkpoint: as it records, as its published row, or as its shapes tell; flags beat all."""
    if state["format"] == "qkformer":
        cfg = load(recipe, argv, state["config"])
        own = load(recipe, argv, validate=False).dataset  # of the script, or of --dataset
        if own != cfg.dataset and {own, cfg.dataset} & set(EVENT_DATASETS):
            raise UserError(
                f"{path} was trained on {cfg.dataset}, and this is for {own}: use the scripts of the former"
            )
        if own != cfg.dataset:
            logger.warning(f"warning: {path} was trained on {cfg.dataset}, and that is what is evaluated, not {own}")
        for key, ours, theirs in differences(cfg, state, MODEL_FIELDS):
            logger.warning(f"{key} is {ours!r}, where the checkpoint recorded {short(theirs)}")
    elif known := published.recipe_of(path, recipe.parent):
        cfg = load(known, argv)
        logger.info(f"{path}: the released checkpoint of {known.stem}, known by its md5")
    else:
        cfg = load(recipe, argv, _shown_by(state, path))
    return dataclasses.replace(cfg, checkpoint=str(path))


def _shown_by(state: dict, path: Path) -> dict[str, object]:
    """Settings that a checkpoint of another project shows: shapes tell the network, `args` may tell T and size."""
    try:
        name, arguments = identify(state["state_dict"])
    except ValueError as error:
        logger.warning(f"{path}: {error}; trying what recipe and flags say")
        return {}
    if arguments["residual"] == "ms":
        arguments["ssa_membrane"] = "per_sample"
    for key, theirs in (("time_steps", "time_step"), ("time_steps", "T"), ("input_size", "input_size")):
        value = getattr(state.get("args"), theirs, None)
        if isinstance(value, int) and FIELDS[key].metadata["low"] <= value <= FIELDS[key].metadata["high"]:
            arguments[key] = value
    told = [key for key in ("time_steps", "input_size") if key in arguments]
    logger.info(
        f"{path}: {name}, known by its shapes; the file tells {' and '.join(told) or 'neither T nor size'}. "
        "Other values: --time-steps, --input-size (224, 288 and 384 differ by nothing else), --ssa-membrane"
    )
    return {"model": name, **arguments}


def load_weights(cfg: Config, model: nn.Module, state: dict, path: Path | str, new_head: bool = False) -> None:
    """Load a checkpoint's weights, under our names or released ones; raises `UserError` where they do not fit."""
    weights = state["state_dict"]
    if cfg.use_ema and state.get("state_dict_ema"):
        weights = state["state_dict_ema"]
        logger.info(f"{path}: taking the averaged weights (--no-use-ema takes the others)")
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    head = weights.get("head.weight")
    if new_head and head is not None and len(head) != model.num_classes:
        logger.info(f"{path}: a new head for {model.num_classes} classes in place of {len(head)}")
        trunc_normal_(model.head.weight, std=2e-5)  # as the released fine-tuning
        weights |= {"head.weight": model.head.weight, "head.bias": model.head.bias}
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError(f"checkpoint {path}: {name} holds values that are not finite; take an older one")
    theirs = state.get("config", {}).get("model", cfg.model)
    try:
        if any(name.startswith("stages.") for name in weights):
            model.load_state_dict(weights)
        else:
            load_released(model, weights)
    except (ValueError, RuntimeError) as error:
        of = f" of {short(theirs)}, not {cfg.model!r}" if theirs != cfg.model else ""
        raise UserError(f"checkpoint {path}{of}: {textwrap.shorten(str(error), 400)}") from None
