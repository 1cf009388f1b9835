"""The bodies of the scripts: `train` and `test` of one recipe."""

import contextlib
import dataclasses
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from pkgutil import resolve_name

import timm.utils
import torch
from torch import Tensor, nn

from models.backends import triton_problem

from . import checkpoint, log
from . import world as distributed
from .cli import UserError, short, spare_children
from .config import LOCAL_FIELDS, MODEL_FIELDS, Config, Sources, mixes, plain, read
from .data import event, image
from .data.folders import data_path, find_classes, split_folders
from .data.loaders import Data
from .data.recordings import EVENT_DATASETS, event_folder
from .evaluate import Gallery, evaluate, published, report, warn_of_other_classes, write
from .log import logger
from .optim import base_lr, create_optimizer, effective_batch, total_epochs
from .run_dir import Start, checkpoint_to_test, find_run, records, warn_of_seen
from .trainer import Trainer
from .weights import build_model, differences, load_weights, settings_of, warn_of_other_network, warn_of_silence
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
    warn_of_other_classes(data.classes, start.state or {}, start.path)
    model = _model_to_train(cfg, world, start, data)
    trainer = Trainer(cfg, world, model, create_optimizer(cfg, model), data, start.folder)
    if start.state:
        trainer.resume(start.state, start.path, new_run=not start.continues)
    _announce(trainer, sources)
    with trainer.stop_request, records(cfg, world, start.folder, data, trainer.epoch) as run_log:
        while trainer.epoch < total_epochs(cfg):
            _train_one_epoch(trainer, run_log)
    logger.info(f"best top-1 {trainer.best['test_top1']:.2f} %; checkpoints, metrics and curves are in {start.folder}")


def _train_one_epoch(trainer: Trainer, run_log: log.RunLog | None) -> None:
    """Train, evaluate, record, save."""
    cfg, world, name, epoch = trainer.cfg, trainer.world, trainer.name, trainer.epoch
    began, samples = time.monotonic(), []

    def keep(images: Tensor, *_) -> None:
        samples[:] = samples or [images[:32]]

    train_loss = trainer.train_epoch()
    result = evaluate(cfg, world, trainer.evaluated, trainer.data.test, f"{name} test", keep, trainer.stop_request)
    trainer.stop_if_asked("in the evaluation")
    is_best = trainer.end_epoch(result)
    row = {"epoch": epoch, "lr": trainer.optimizer.param_groups[0]["lr"], "train_loss": train_loss}
    row |= {f"test_{key}": result[key] for key in ("loss", "top1", "top5")}
    row["seconds"] = round(time.monotonic() - began, 2)
    if run_log:
        run_log.epoch(row)
        if samples and not cfg.compile:  # the hooks would compile the network once more
            warn_of_silence(trainer.evaluated, samples[0])
    trainer.save(is_best)
    logger.info(
        f"{name}: lr {row['lr']:.2e}, train loss {train_loss:.4f}, test loss {result['loss']:.4f}, "
        f"top-1 {result['top1']:.2f} %, best {trainer.best['test_top1']:.2f} % "
        f"(epoch {trainer.best['epoch'] + 1}), {row['seconds']:.1f} s"
    )


@distributed.membership()
def test(recipe: Path, meter: str | None) -> None:
    """Evaluate `--checkpoint` as the recipe and the command line say.

    Args:
        meter: "module:name" of what `--energy` measures with; a name, because analyses import the engine.
    """
    sources = read(recipe, sys.argv[1:])
    cfg = sources.config(validate=False)
    world = setup(cfg, sources.ignored)
    path = distributed.from_main(checkpoint_to_test(cfg) if world.is_main else None)
    state = checkpoint.read(path)
    cfg = _counted(settings_of(state, path, sources))
    folder = Path(cfg.output_dir or path.parent)
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # fail before the evaluation, not after it
    data = create_data(cfg, world, train=False)
    warn_of_other_classes(data.classes, state, path)
    warn_of_seen(data, path)
    about = published(cfg)
    membranes = dict.fromkeys((cfg.ssa_membrane, *(("released", "per_sample") if cfg.both_membranes else ())))
    logger.info(
        f"evaluating {path} as {cfg.model}, T = {cfg.time_steps}, at {cfg.input_size} x {cfg.input_size} pixels, in "
        f"batches of {cfg.eval_batch_size or cfg.batch_size}, ssa_membrane {' and '.join(membranes)}, "
        f"on {cfg.data_path or cfg.dataset}"
    )
    _test_kernels(cfg, world)
    gallery, results, energy = Gallery(data.classes, data.show), {}, None
    for membrane in membranes:
        model = build_model(dataclasses.replace(cfg, ssa_membrane=membrane)).to(world.device)
        load_weights(cfg, model, state, path)
        if cfg.compile:
            model.compile()
        is_first = not results
        measuring = resolve_name(meter)(model) if cfg.energy and is_first else contextlib.nullcontext()
        with measuring as measured:
            results[membrane] = evaluate(cfg, world, model, data.test, on_batch=gallery.add if is_first else None)
        if not math.isfinite(results[membrane]["loss"]):
            raise UserError(f"{path}: gives a loss that is not finite; use --eval-amp off, or another checkpoint")
        report(cfg, membrane, results[membrane], about)
        if is_first and gallery.first is not None and not cfg.compile:
            warn_of_silence(model, gallery.first, "check the settings of the input, or train longer")
        if measured:
            energy = measured.report(distributed.gather)
            logger.info(energy.totals())
            if about.paper_energy_mj:
                logger.info(f"published: {about.paper_energy_mj:.2f} mJ (paper)")
    if world.is_main:
        write(cfg, folder, results, about, gallery, energy)


def setup(cfg: Config, ignored: Iterable[str] = ()) -> World:
    """Set up threads, ranks, device, arithmetic and console; print keys and flags that are `ignored`."""
    spare_children()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    world = distributed.setup(cfg.device)
    distributed.set_arithmetic(cfg)
    _require_gpu(cfg, world)
    log.setup_console(world.is_main)
    for amp in dict.fromkeys((cfg.amp, cfg.eval_amp)):
        if distributed.is_slow(amp, world.device):
            logger.info(f"{amp} is slow on this CPU; using float32")
    if ignored:
        logger.info(f"without effect here: {', '.join(dict.fromkeys(ignored))}")
    return world


def create_data(cfg: Config, world: World, train: bool = True) -> Data:
    """Return the loaders of images or of event frames; raise `UserError` as they do."""
    data = (event if cfg.dataset in EVENT_DATASETS else image).create_data(cfg, world, train)
    if len(data.classes) < 2:
        raise UserError(f"{cfg.data_path or cfg.dataset}: has one class; add a folder for another")
    return data


def _settings_to_train(sources: Sources, start: Start) -> Config:
    """Return the settings of a run: its own if it continues, else those of the recipe, under flags."""
    cfg = _counted(sources.config(start.state["config"] if start.continues else None))
    if start.continues and "config" in sources.flags:
        recipe = _counted(sources.config(validate=False))
        for key, value, recorded in differences(recipe, plain(cfg), plain(cfg, without=LOCAL_FIELDS)):
            change = f"{start.path} was trained with {key} = {recorded!r}, not {value!r}"
            raise UserError(f"--config {sources.path}: {change}; omit the flag, or branch off with --output-dir NEW")
    recorded = start.state["config"] if start.is_ours else plain(cfg)
    for key, value, trained in differences(cfg, recorded, ("variant", *MODEL_FIELDS, "opt")):
        raise UserError(f"--resume {start.path}: trained with {key}={short(trained)}, not {value!r}; use --finetune")
    return cfg


def _counted(cfg: Config) -> Config:
    """Return the settings with the number of classes; null counts the folders of the data set."""
    if cfg.num_classes is not None:
        return cfg
    if cfg.dataset == "eventfolder":
        return dataclasses.replace(cfg, num_classes=len(event_folder(data_path(cfg), cfg.split_seed).classes))
    folders = split_folders(data_path(cfg)) if cfg.dataset == "imagefolder" else {}
    if not folders:
        raise UserError(f"num_classes: no folders train and val in {cfg.data_path}; make both, or use --num-classes")
    return dataclasses.replace(cfg, num_classes=len(find_classes(next(iter(folders.values())))[0]))


def _require_equal_settings(cfg: Config) -> None:
    """Raise `UserError` if ranks have different settings: they would wait for each other."""
    first, *others = distributed.gather([plain(cfg, without=("config", "data_path", "workers", "threads"))])
    for other in others:
        for key in (key for key in first if first[key] != other[key]):
            raise UserError(f"{key}: {first[key]!r} on one rank, {other[key]!r} on another; use the same flags on all")


def _require_gpu(cfg: Config, world: World) -> None:
    """Raise `UserError` for flags that need a GPU."""
    is_cpu, ranks = world.device.type == "cpu", world.world_size
    is_kernel = cfg.lif_backend in ("cupy", "triton") and torch.cuda.is_available()  # else models say what is missing
    rules = (
        (cfg.sync_bn and is_cpu and ranks > 1, "sync-bn", "torch synchronises BatchNorm on GPUs alone"),
        (cfg.cuda_graphs and (is_cpu or ranks > 1), "cuda-graphs", "needs one rank on a GPU"),
        (cfg.pack_spikes and is_cpu and cfg.lif_backend == "auto", "pack-spikes", "needs the Triton kernels on a GPU"),
        (is_kernel and is_cpu, "lif-backend", f"{cfg.lif_backend} needs a GPU, and --device is cpu"),
    )
    for is_wrong, flag, reason in rules:
        if is_wrong:
            raise UserError(f"--{flag}: {reason}; omit it")


def _test_kernels(cfg: Config, world: World) -> None:
    """Test the Triton kernels before the network needs them: on one rank of each machine first, which fills the cache.

    Raises:
        UserError: they do not work, and a flag needs them; or on some ranks only, which would use other collectives.
    """
    if world.device.type == "cpu" or cfg.compile or cfg.lif_backend not in ("auto", "triton"):
        return
    problem = distributed.in_turns(triton_problem)
    problems = distributed.gather([problem])
    if any(problems) and not all(problems):
        rank, reason = next((rank, reason) for rank, reason in enumerate(problems) if reason)
        reason = reason.partition(";")[0]
        raise UserError(f"rank {rank}: lif_backend='triton' {reason}; use --lif-backend cupy or torch on all")
    if problem and (cfg.cuda_graphs or cfg.pack_spikes):
        raise UserError(f"--cuda-graphs, --pack-spikes: need the Triton kernels; lif_backend='triton' {problem}")
    if not world.is_main:
        warnings.filterwarnings("ignore", "lif_backend='auto'")  # the main rank prints why it does without Triton


def _model_to_train(cfg: Config, world: World, start: Start, data: Data) -> nn.Module:
    """Return the network with the weights that training starts from, unless `Trainer.resume` loads them."""
    path, state = (start.path, start.state) if start.state else (cfg.finetune, None)
    if path:
        warn_of_seen(data, Path(path))
    _test_kernels(cfg, world)
    model = build_model(cfg).to(world.device)
    if path and not start.is_ours:
        state = state or checkpoint.read(path)
        load_weights(cfg, model, state, path, adapt=not start.state)
        warn_of_other_network(cfg, state, path)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if cfg.sync_bn and world.world_size > 1 else model


def _announce(trainer: Trainer, sources: Sources) -> None:
    cfg, world, batch = trainer.cfg, trainer.world, effective_batch(trainer.cfg)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    mixing = f"mixup in the first {cfg.mixup_off_epoch or total_epochs(cfg)} epochs" if mixes(cfg) else "no mixup"
    logger.info(
        f"{cfg.model}: {parameters:,} parameters, T = {cfg.time_steps}, on {world.world_size} x {world.device.type}; "
        f"effective batch {batch}, learning rate {base_lr(cfg):.3g}\n"
        f"ssa_membrane {cfg.ssa_membrane}, {mixing}; writing to {trainer.folder}"
    )
    if cfg.ssa_membrane == "released" and cfg.residual == "sew":
        logger.info("ssa_membrane released: answers depend on the other samples of a batch; per_sample avoids it")
    warn_of_recipe(cfg, sources)
    if cfg.effective_batch not in (None, batch):
        is_long = cfg.effective_batch * cfg.accum_iter <= batch * trainer.steps
        fix = "adapt --accum-iter" if is_long else f"an epoch has {trainer.steps} steps, so adapt --lr"
        logger.warning(f"warning: effective batch {batch}, the recipe has {cfg.effective_batch}; {fix}")
    if trainer.epoch >= total_epochs(cfg):
        logger.info(f"nothing left to train: {trainer.epoch} of {total_epochs(cfg)} epochs are done")


def warn_of_recipe(cfg: Config, sources: Sources) -> None:
    """Warn about settings with which the script's recipe reproduces a published result, if the run has others."""
    own = sources if sources.path == sources.script_recipe else read(sources.script_recipe)
    recipe = dataclasses.replace(own, flags={}).config(validate=False)
    if recipe.paper_top1 and (recipe.dataset, recipe.model) == (cfg.dataset, cfg.model) and not cfg.variant:
        for key, value, released in differences(cfg, plain(recipe), ("ssa_membrane", "mixup_off_epoch")):
            logger.warning(f"warning: {key} = {value!r}, {sources.script_recipe} has {released!r} as the published run")
