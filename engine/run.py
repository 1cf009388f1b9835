"""Bodies of the scripts: `train` and `test` of one recipe."""

import contextlib
import dataclasses
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from pkgutil import resolve_name

import timm.utils
import torch
from torch import nn

from models.backends import triton_problem

from . import checkpoint, log, weights
from . import world as distributed
from .cli import UserError, short, spare_children
from .config import LOCAL_FIELDS, MODEL_FIELDS, Config, Sources, mixes, plain, read
from .data import event, image
from .data.folders import data_path, find_classes, part_folder, split_folders
from .data.loaders import Data
from .data.recordings import EVENT_DATASETS, event_folder
from .evaluate import evaluate, published, report, warn_of_other_classes, write
from .log import logger
from .optim import base_lr, create_optimizer, effective_batch, total_epochs
from .run_dir import Start, checkpoint_to_test, find_run, records, warn_of_seen
from .trainer import Trainer
from .weights import build_model, differences, load_weights, settings_of, with_data_of_run
from .world import World


@distributed.membership()
def train(recipe: Path) -> None:
    """Train as the recipe and the command line say."""
    sources = read(recipe, sys.argv[1:])
    cfg = sources.config(validate=False)  # the rest may come from a checkpoint
    if cfg.checkpoint or cfg.energy:
        raise UserError("--checkpoint, --energy: are for test.py; to continue a run use --resume")
    if cfg.eval:
        test(recipe, None)
        return
    world = setup(cfg, sources.ignored)
    start = find_run(cfg, world)
    cfg = _settings_to_train(sources, start)
    _require_equal_settings(cfg)
    timm.utils.random_seed(cfg.seed)
    data = create_data(cfg, world)
    warn_of_other_classes(data.classes, start.state, start.path)
    model = _model_to_train(cfg, world, start, data)
    trainer = Trainer(cfg, world, model, create_optimizer(cfg, model), data, start.folder)
    if start.state:
        trainer.resume(start.state, start.path, new_run=not start.continues)
        if trainer.epoch >= total_epochs(cfg) and not start.continues:
            raise UserError(f"epochs = {cfg.epochs}: {start.path} has done {trainer.epoch}; raise it to train on")
    _announce(trainer, sources)
    with trainer.stop_request, records(cfg, world, start, data, trainer.epoch) as record:
        while trainer.epoch < total_epochs(cfg):
            _train_one_epoch(trainer, record)
    logger.info(f"best top-1 {trainer.best['test_top1']:.2f} %; checkpoints and metrics are in {start.folder}")


def _train_one_epoch(trainer: Trainer, record: Callable[[dict], None] | None) -> None:
    cfg, world, name, epoch = trainer.cfg, trainer.world, trainer.name, trainer.epoch
    began, train_loss, stop = time.monotonic(), trainer.train_epoch(), trainer.stop_request
    result, images, _ = evaluate(cfg, world, trainer.evaluated, trainer.data.test, f"{name} test", stop)
    trainer.stop_if_asked("in the evaluation")
    is_best = trainer.end_epoch(result)
    row = {"epoch": epoch, "lr": trainer.lr, "train_loss": train_loss}
    row |= {f"test_{key}": result[key] for key in ("loss", "top1", "top5")}
    row["seconds"] = round(time.monotonic() - began, 2)
    if record:
        record(row)
        weights.warn_of_silence(cfg, trainer.evaluated, images)
    trainer.save(is_best)
    best = f"best {trainer.best['test_top1']:.2f} % (epoch {trainer.best['epoch'] + 1})"
    logger.info(
        f"{name}: lr {row['lr']:.2e}, train loss {train_loss:.4f}, test loss {result['loss']:.4f}, "
        f"top-1 {result['top1']:.2f} %, {best}, {row['seconds']:.1f} s"
    )


@distributed.membership()
def test(recipe: Path, meter: str | None) -> None:
    """Evaluate `--checkpoint`; `meter` ("module:name") measures `--energy`, because analyses import the engine."""
    sources = read(recipe, sys.argv[1:])
    cfg = sources.config(validate=False)
    world = setup(cfg, sources.ignored)
    path = distributed.gather([checkpoint_to_test(cfg) if world.is_main else None])[0]
    state = checkpoint.read(path)
    cfg = _counted(settings_of(state, path, sources))
    _require_equal_settings(cfg)
    folder = Path(cfg.output_dir or path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # fail before the evaluation, not after it
    data, about = create_data(cfg, world, train=False), published(cfg)
    warn_of_other_classes(data.classes, state, path)
    warn_of_seen(data, path)
    logger.info(
        f"evaluating {path} as {cfg.model}, T = {cfg.time_steps}, at {cfg.input_size} x {cfg.input_size} pixels, in "
        f"batches of {cfg.eval_batch_size or cfg.batch_size}, ssa_membrane {cfg.ssa_membrane}, "
        f"on {cfg.data_path or cfg.dataset}"
    )
    _check_device(cfg, world)
    model = build_model(cfg).to(world.device)
    load_weights(cfg, model, state, path)
    if cfg.compile:
        model.compile()
    with resolve_name(meter)(model) if cfg.energy else contextlib.nullcontext() as measured:
        result, images, mistakes = evaluate(cfg, world, model, data.test)
    if not math.isfinite(result["loss"]):
        raise UserError(f"{path}: gives a loss that is not finite; use --eval-amp off, or another checkpoint")
    energy = measured.report(distributed.gather) if measured else None
    report(result, about, energy)
    if world.is_main:
        weights.warn_of_silence(cfg, model, images)
        write(cfg, folder, result, about, data, mistakes, energy)


def setup(cfg: Config, ignored: Iterable[str] = ()) -> World:
    """Set up threads, ranks, device, arithmetic and console; print keys and flags that are `ignored`."""
    spare_children()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    world = distributed.setup(cfg.device)
    distributed.set_arithmetic(cfg)
    _require_gpu(cfg, world)
    log.setup_console(world.is_main)
    if ignored:
        logger.info(f"without effect here: {', '.join(dict.fromkeys(ignored))}")
    return world


def create_data(cfg: Config, world: World, train: bool = True) -> Data:
    """Return the loaders of images or of event frames."""
    data = (event if cfg.dataset in EVENT_DATASETS else image).create_data(cfg, world, train)
    if len(data.classes) < 2:
        raise UserError(f"{cfg.data_path or cfg.dataset}: has one class; add a folder for another")
    sizes = len(data.train.dataset) if train else 0, len(data.test.dataset)
    if different := [other for other in distributed.gather([sizes]) if other != sizes]:
        raise UserError(f"{cfg.data_path or cfg.dataset}: {sizes} samples on one rank, {different[0]} on another")
    return data


def _settings_to_train(sources: Sources, start: Start) -> Config:
    """Return the settings of a run: its own if it continues, else those of the recipe, under flags."""
    cfg = sources.config(start.state["config"] if start.continues else None)
    cfg = _counted(with_data_of_run(cfg, start.path, sources) if start.continues else cfg)
    if start.continues and "config" in sources.flags:
        recipe = _counted(sources.config(validate=False))
        for key, value, recorded in differences(recipe, plain(cfg), plain(cfg, without=LOCAL_FIELDS)):
            change = f"{key} = {value!r}, {start.path} was trained with {recorded!r}"
            raise UserError(f"--config {sources.path}: {change}; omit --config, or branch off with --output-dir NEW")
    recorded = start.state["config"] if start.is_native else plain(cfg)
    groups = ("opt", "decay_1d", "layer_decay")  # of parameters in the optimizer
    for key, value, trained in differences(cfg, recorded, ("variant", *MODEL_FIELDS, *groups)):
        raise UserError(f"--resume {start.path}: trained with {key}={short(trained)}, not {value!r}; use --finetune")
    return cfg


def _counted(cfg: Config) -> Config:
    """Return the settings with the number of classes; null counts the folders of the data set."""
    if cfg.num_classes is not None:
        return cfg
    if cfg.dataset == "eventfolder":
        return dataclasses.replace(cfg, num_classes=len(event_folder(data_path(cfg), cfg.split_seed).classes))
    if cfg.dataset != "imagefolder":
        raise UserError(f"num_classes: {cfg.dataset} has no folders to count; use --num-classes")
    root = data_path(cfg)
    folder = part_folder(root, next(iter(split_folders(root)), "train"))
    return dataclasses.replace(cfg, num_classes=len(find_classes(folder)[0]))


def _require_equal_settings(cfg: Config) -> None:
    """Raise `UserError` if ranks have different settings: they would wait for each other."""
    first, *others = distributed.gather([plain(cfg, without=("config", "data_path", "workers", "threads"))])
    for other in others:
        for key in (key for key in first if first[key] != other[key]):
            raise UserError(f"{key}: {first[key]!r} on one rank, {other[key]!r} on another; use the same flags on all")


def _require_gpu(cfg: Config, world: World) -> None:
    """Raise `UserError` for flags that need a GPU."""
    is_cpu, ranks, backend = world.device.type == "cpu", world.world_size, cfg.lif_backend
    is_kernel = backend in ("cupy", "triton") and torch.cuda.is_available()  # else the models report what is missing
    rules = {
        "sync-bn: torch synchronises BatchNorm on GPUs alone": cfg.sync_bn and is_cpu and ranks > 1,
        "cuda-graphs: needs one rank on a GPU": cfg.cuda_graphs and (is_cpu or ranks > 1),
        "pack-spikes: needs the Triton kernels on a GPU": cfg.pack_spikes and is_cpu and backend == "auto",
        f"lif-backend {backend}: needs a GPU": is_kernel and is_cpu,
    }
    if problems := [problem for problem, is_wrong in rules.items() if is_wrong]:
        raise UserError(f"--{problems[0]}; omit it")


def _check_device(cfg: Config, world: World) -> None:
    """Print slow precisions; test the Triton kernels on one rank of each machine, which fills the cache, then on all.

    Raise `UserError` if a flag needs them and they fail, or on some ranks, which would use other collectives.
    """
    for amp in dict.fromkeys((cfg.amp, cfg.eval_amp)):
        if distributed.is_slow(amp, world.device):
            logger.info(f"{amp} is slow on this CPU; using float32")
    if world.device.type == "cpu" or cfg.compile or cfg.lif_backend not in ("auto", "triton"):
        return
    problem = distributed.in_turns(triton_problem)
    problems = distributed.gather([problem])
    if None in problems and (failed := [rank for rank, reason in enumerate(problems) if reason]):
        reason = problems[failed[0]].partition(";")[0]
        raise UserError(f"rank {failed[0]}: lif_backend='triton' {reason}; use --lif-backend cupy or torch on all")
    if problem and (cfg.cuda_graphs or cfg.pack_spikes):
        raise UserError(f"--cuda-graphs, --pack-spikes: need the Triton kernels; lif_backend='triton' {problem}")
    if not world.is_main:
        warnings.filterwarnings("ignore", "lif_backend='auto'")  # the main rank prints why it does without Triton


def _model_to_train(cfg: Config, world: World, start: Start, data: Data) -> nn.Module:
    """Return the network with the weights that training starts from, unless `Trainer.resume` loads them."""
    path = start.path if start.state else cfg.finetune
    if path:
        warn_of_seen(data, Path(path))
    _check_device(cfg, world)
    model = build_model(cfg).to(world.device)
    if path and not start.is_native:
        state = start.state or checkpoint.read(path)
        load_weights(cfg, model, state, path, adapt=not start.state)
        weights.warn_of_other_network(cfg, state, path)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if cfg.sync_bn and world.world_size > 1 else model


def _announce(trainer: Trainer, sources: Sources) -> None:
    cfg, world, batch = trainer.cfg, trainer.world, effective_batch(trainer.cfg)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    mixing = f"mixup in the first {cfg.mixup_off_epoch or total_epochs(cfg)} epochs" if mixes(cfg) else "no mixup"
    logger.info(
        f"{cfg.model}: {parameters:,} parameters, T = {cfg.time_steps}, on {world.world_size} x {world.device.type}; "
        f"effective batch {batch}, learning rate {base_lr(cfg):.3g}\n"
        f"ssa_membrane {cfg.ssa_membrane}, {mixing}; on {cfg.data_path or cfg.dataset}, writing to {trainer.folder}"
    )
    if cfg.ssa_membrane == "released":
        logger.info("ssa_membrane released: answers depend on the other samples of a batch; per_sample avoids it")
    weights.warn_of_recipe(cfg, sources)
    if cfg.effective_batch not in (None, batch):
        fix = f"adapt --accum-iter or --lr; an epoch has {trainer.steps} steps"
        logger.warning(f"warning: effective batch {batch}, the recipe has {cfg.effective_batch}; {fix}")
