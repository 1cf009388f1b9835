"""Weights: from a file to settings, from settings to a network, and from the file into the network."""

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from models import create_model, registry
from models.neuron import LIF
from models.released import load_released, translated, without_prefixes

from .cli import UserError, short
from .config import FIELDS, MODEL_FIELDS, Config, Sources, plain, read
from .log import logger

RELEASED = {md5: tag.replace(".in1k", "") for tag, (_, md5) in registry.RELEASED.items()}  # md5 -> recipe in imagenet/


def model_arguments(cfg: Config) -> dict[str, object]:
    """Return the arguments of `create_model` for `cfg`; no network takes all, so defaults are left out."""
    always, keys = ("num_classes", "in_channels", "time_steps"), (*MODEL_FIELDS[1:], "drop_path")
    return {key: getattr(cfg, key) for key in keys if key in always or getattr(cfg, key) != FIELDS[key].default}


def build_model(cfg: Config) -> nn.Module:
    """Return the network of `cfg`."""
    if cfg.pack_spikes and cfg.model not in registry.QKFORMERS:
        raise UserError(f"--pack-spikes: {cfg.model} has no path that packs spikes; omit it")
    try:
        model = create_model(cfg.model, **model_arguments(cfg), lif_backend=cfg.lif_backend)
        if cfg.pack_spikes:
            model.set_spike_packing()
    except (TypeError, ValueError) as error:
        raise UserError(f"model = {cfg.model}: {str(error).removeprefix(f'model={cfg.model!r}: ')}") from None
    model.set_grad_checkpointing(cfg.grad_checkpointing)
    return model.to(memory_format=torch.channels_last) if cfg.channels_last else model


def settings_of(state: dict, path: Path, sources: Sources) -> Config:
    """Return the settings to evaluate a checkpoint with: its record, its published row or its shapes, under flags.

    `epochs` is 0 without a record of its training, so that analysis.tables does not count it as a run of the recipe.
    """
    is_recorded = "epochs" in state.get("config", {})
    if state["format"] == "qkformer":
        recipe = sources.script_recipe.with_name(f"{Path(str(state['config'].get('recipe'))).name}.yml")
        if "config" not in sources.flags and recipe != sources.path and os.path.isfile(recipe):
            sources = dataclasses.replace(read(recipe), flags=sources.flags, script_recipe=sources.script_recipe)
        cfg = sources.config(state["config"] | _trained_batch(state))
        warn_of_other_network(cfg, state, path)
        cfg = with_data_of_run(cfg, path, sources)
    elif "config" not in sources.flags and (known := recipe_of(path, sources.script_recipe.parent)):
        cfg, is_recorded = dataclasses.replace(read(known), flags=sources.flags).config(), True
        logger.info(f"{path}: the released checkpoint of {known.stem}, recognised by its md5")
    else:
        shown = _shown_by(state, path)
        if (name := shown.get("model")) in sources.recipes and not sources.flags.keys() & {"model", "variant"}:
            logger.info(f"{path}: evaluating with the settings of --variant {name} in {sources.path}")
            sources = dataclasses.replace(sources, flags={"variant": name} | sources.flags)
        cfg = sources.config(shown)
    return dataclasses.replace(cfg, checkpoint=str(path), epochs=cfg.epochs if is_recorded else 0)


def _trained_batch(state: dict) -> dict[str, int]:
    """Return the effective batch of the training, if recorded; a run may have more or fewer ranks than its recipe."""
    order = state.get("position", {}).get("order")
    sizes = [order.get(key) for key in ("batch_size", "accum_iter", "world_size")] if isinstance(order, dict) else [""]
    return {"effective_batch": math.prod(sizes)} if all(isinstance(size, int) for size in sizes) else {}


def with_data_of_run(cfg: Config, path: Path, sources: Sources) -> Config:
    """Return the settings with the data folder that the run of the checkpoint recorded, unless a flag names one."""
    known, record = cfg.data_path, path.with_name("config.yml")
    if (sources.recipes[None] | sources.flags).get("dataset", cfg.dataset) != cfg.dataset:
        logger.info(f"{path}: using {cfg.dataset}, the data set of its training")
        known = None  # the recipe's is of other data
    if "data_path" in sources.flags:
        return cfg
    recorded = read(record).config(validate=False).data_path if record.is_file() else None
    is_elsewhere = recorded and not os.path.exists(recorded) and os.path.exists(known or "")  # a copied run
    return dataclasses.replace(cfg, data_path=known if is_elsewhere or recorded is None else recorded)


def recipe_of(path: Path, folder: Path) -> Path | None:
    """Return the recipe in `folder` of a released checkpoint, known by its md5."""
    with path.open("rb") as file:  # in parts: a checkpoint has up to a gigabyte
        name = RELEASED.get(hashlib.file_digest(file, "md5").hexdigest())
    recipe = folder / f"{name}.yml"
    return recipe if recipe.exists() else None


def _leaks(model: str, residual: str | None) -> bool:
    """Return True if the membrane leaks across the batch in the released code of a network."""
    return model in registry.QKFORMERS and residual == "sew"


def _shown_by(state: dict, path: Path) -> dict[str, object]:
    """Infer settings of a checkpoint of another project: the network from shapes, T and size from its `args`."""
    try:
        name, arguments = registry.identify(state["state_dict"])
    except ValueError as error:
        logger.warning(f"warning: {path}: {error}; trying recipe and flags")
        return {}
    if not _leaks(name, arguments.get("residual")):
        arguments["ssa_membrane"] = "per_sample"
    args, names = state.get("args"), {"T": "time_steps", "time_step": "time_steps", "input_size": "input_size"}
    shown = {names[key]: value for key in names if isinstance(value := getattr(args, key, None), int)}
    logger.info(
        f"{path}: {name}, recognised by its shapes, with {' and '.join(shown) or 'neither T nor size'} recorded. "
        "Shapes do not show --time-steps, --input-size, --ssa-membrane and --heads"
    )
    return {"model": name, **arguments, **shown}


def load_weights(cfg: Config, model: nn.Module, state: dict, path: Path | str, adapt: bool = False) -> None:
    """Load a checkpoint's weights, under names of this project or released ones; raise `UserError` if they do not fit.

    With `adapt` a head of other classes is replaced by a new one, and an input of other channels is adapted.
    """
    weights = state["state_dict"]
    if cfg.use_ema and state.get("state_dict_ema"):
        weights = state["state_dict_ema"]
        logger.info(f"{path}: using the averaged weights (--no-use-ema for the others)")
    weights = without_prefixes(weights)
    head = weights.get("head.weight")
    if adapt and (changed := _adapted_input(model, weights)):
        logger.info(f"{path}: first convolution adapted to {model.in_channels} channels")
        weights |= changed
    if adapt and head is not None and len(head) != model.num_classes:
        logger.info(f"{path}: new head for {model.num_classes} classes in place of {len(head)}")
        trunc_normal_(model.head.weight, std=2e-5)  # as the released fine-tuning
        weights |= {"head.weight": model.head.weight, "head.bias": model.head.bias}
    if name := next((name for name, value in weights.items() if not value.isfinite().all()), None):
        raise UserError(f"{path}: {name} holds values that are not finite; use an older checkpoint")
    trained = state.get("config", {}).get("model", cfg.model)
    try:
        load_released(model, weights)
    except ValueError as error:
        is_same = trained == cfg.model
        fix = "use the settings of its training" if is_same else f"use --model {short(trained)}, as in its training"
        raise UserError(f"{path}: {error}; {fix}") from None


def _adapted_input(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the first convolution by its name, repeated or added up as timm does, if its input channels differ."""
    first, channels = translated(weights, model).get("stages.0.embed.units.0.conv.weight"), model.in_channels
    if first is None or first.dim() != 4 or first.shape[1] in (0, channels):
        return {}
    name, width = next(name for name, value in weights.items() if value is first), first.shape[1]
    repeated = first.repeat(1, -(-channels // width), 1, 1)[:, :channels] * (width / channels)
    return {name: first.sum(1, keepdim=True) if channels == 1 else repeated}


def warn_of_other_network(cfg: Config, state: dict, path: Path | str) -> None:
    """Warn about settings that change the network but not the shapes of its weights."""
    released = {"ssa_membrane": "released" if _leaks(cfg.model, cfg.residual) else "per_sample"}
    released["time_steps"] = getattr(state.get("args"), "time_step", cfg.time_steps)
    recorded, how = (state["config"], "trained with") if state.get("config") else (released, "probably trained with")
    keys = "variant ssa_membrane residual time_steps attention ssa_scale neuron tau heads".split()
    for key, value, trained in differences(cfg, recorded, keys):
        logger.warning(f"warning: {path}: {how} {key} = {short(trained)}, this run has {value!r}")


def differences(cfg: Config, recorded: dict, keys: Sequence[str]) -> Iterator[tuple[str, object, object]]:
    """Return (key, value in `cfg`, value recorded) of each setting among `keys` that is recorded and differs."""
    values = plain(cfg)
    return ((key, values[key], recorded[key]) for key in keys if key in recorded and values[key] != recorded[key])


def warn_of_recipe(cfg: Config, sources: Sources) -> None:
    """Warn about settings that differ from a published run, which the recipe of the script reproduces."""
    recipe = read(sources.script_recipe).config()
    if recipe.paper_top1 and (recipe.dataset, recipe.model) == (cfg.dataset, cfg.model) and not cfg.variant:
        for key, value, released in differences(cfg, plain(recipe), ("ssa_membrane", "mixup_off_epoch")):
            logger.warning(f"warning: {key} = {value!r}, {sources.script_recipe} has {released!r} as the published run")


@torch.inference_mode()
def warn_of_silence(cfg: Config, model: nn.Module, images: Tensor) -> None:
    """Warn about layers with no spikes on these images; nothing after them can learn."""
    if cfg.compile:  # the hooks would compile the network once more
        return
    model.eval()
    if names := silent_layers(model, images):
        where = ", ".join(names[:3]) + (f" and {len(names) - 3} more layers" if len(names) > 3 else "")
        updates = min(int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked"))
        fix = f"train longer (BatchNorm has seen {updates} updates), lower lr, or check the settings of the input"
        logger.warning(f"warning: {where}: no spikes on {len(images)} samples; {fix}")


def silent_layers(model: nn.Module, x: Tensor) -> list[str]:
    """Return the names of the `LIF`s of `model` in which no neuron fires on `x`."""
    silent = []
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, LIF):
                note = partial(lambda name, module, args, spikes: None if spikes.any() else silent.append(name), name)
                hooks.enter_context(module.register_forward_hook(note))
        model(x)
    return silent
