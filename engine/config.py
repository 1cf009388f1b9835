"""Typed configuration: defaults below, then the recipe (YAML), then what a checkpoint recorded, then the flags.

A field is declared once, with its type, help and range, and is then a YAML key and a flag (`--batch-size` and
`--batch_size`) alike.
"""

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from .errors import UserError


def option(default, help: str, *, choices=(), low=None, high=None, flags: Sequence[str] = ()):
    """A field of `Config`: allowed values or inclusive range, and further spellings of its flag."""
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "low": low, "high": high, "flags": flags}
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Sizes in pixels, rates per image, learning rates absolute unless said otherwise."""

    config: str = option("", "recipe to read in place of the one beside the script")

    model: str = option("qkformer_4_384", "network, see models.list_models()")
    num_classes: int = option(10, "classes of the data set", low=1)
    in_channels: int = option(3, "channels of the input", low=1)
    time_steps: int = option(4, "T: how often a static image is shown", low=1, high=1024, flags=("--time-step",))
    attention: tuple[str, ...] | None = option(None, "token, channel or self for each stage (default: the model's)")
    mlp_ratio: float | None = option(
        None, "hidden over outer channels of the MLP (default: the model's)", low=0.1, high=64
    )
    shortcut: bool = option(True, "SPEDS with its shortcut")
    residual: str = option("sew", "what residual connections add: spikes or membrane currents", choices=("sew", "ms"))
    ssa_membrane: str = option(
        "per_sample",
        "membrane of the self-attention: per sample, or leaking over the batch as released (README, errata)",
        choices=("per_sample", "released"),
    )
    lif_backend: str = option("auto", "what computes the LIF neurons", choices=("auto", "torch", "cupy"))

    dataset: str = option("digits", "data set", choices=("digits",))
    input_size: int = option(32, "height and width of the input", low=1, high=8192)
    batch_size: int = option(64, "images per process and step", low=1, high=65536)
    eval_batch_size: int | None = option(None, "the same in the evaluation (default: batch_size)", low=1, high=65536)
    workers: int = option(4, "loader processes per training process", low=0, high=256)
    mean: tuple[float, ...] = option((0.485, 0.456, 0.406), "mean of each channel, of 1")
    std: tuple[float, ...] = option((0.229, 0.224, 0.225), "standard deviation of each channel, of 1", low=1e-6)
    interpolation: str = option("bicubic", "resizing filter", choices=("bicubic", "bilinear", "nearest"))
    scale: tuple[float, ...] = option((1.0, 1.0), "random resized crop: area, from and to", low=0.01, high=1)
    ratio: tuple[float, ...] = option((1.0, 1.0), "random resized crop: aspect ratio, from and to", low=0.01)
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    auto_augment: str | None = option(None, "timm's policy, such as rand-m9-mstd0.5-inc1", flags=("--aa",))
    reprob: float = option(0.0, "probability of random erasing", low=0, high=1)
    remode: str = option("const", "what random erasing fills in", choices=("const", "rand", "pixel"))
    crop_pct: float = option(1.0, "evaluation: side of the centre crop over side of the resized image", low=0.1, high=1)
    mixup: float = option(0.0, "alpha of mixup; 0 is none", low=0)
    mixup_prob: float = option(1.0, "probability that mixup is applied", low=0, high=1)
    mixup_mode: str = option("batch", "one mixing ratio per batch, pair or image", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int | None = option(None, "first epoch without mixup (default: never off)", low=0)
    mixup_in: str = option("loader", "mix in the loader's workers or in the training step", choices=("loader", "step"))
    smoothing: float = option(0.1, "label smoothing", low=0, high=0.999)

    opt: str = option("adamw", "timm's optimizer")
    lr: float | None = option(None, "learning rate (default: blr * effective batch / 256)", low=0, high=1000)
    blr: float | None = option(None, "learning rate per 256 images of effective batch", low=0, high=1000)
    weight_decay: float = option(0.05, "weight decay", low=0)
    decay_1d: bool = option(False, "decay biases and BatchNorm too")
    sched: str = option("cosine", "timm's learning-rate schedule", choices=("cosine", "poly", "tanh", "constant"))
    epochs: int = option(300, "epochs of the schedule", low=1)
    cooldown_epochs: int = option(0, "epochs at min_lr behind the schedule", low=0)
    warmup_epochs: int = option(0, "epochs of linear warm-up", low=0)
    warmup_lr: float = option(1e-5, "learning rate at the start of the warm-up", low=0)
    warmup_prefix: bool = option(False, "the decay starts behind the warm-up, not underneath it")
    min_lr: float = option(1e-5, "learning rate at the end of the schedule", low=0)
    lr_step: str = option("epoch", "how often the learning rate changes", choices=("epoch", "iteration"))
    accum_iter: int = option(1, "steps whose gradients are added up for one update", low=1)
    amp: str = option("off", "mixed precision of the training", choices=("fp16", "bf16", "off"))
    eval_amp: str | None = option(
        None, "mixed precision of the evaluation (default: that of the training)", choices=("fp16", "bf16", "off")
    )

    seed: int = option(42, "seed of weights, order and augmentation", low=0, high=2**32 - 1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(None, "CPU threads of torch per process (default: torch's choice)", low=1, high=1024)
    output_dir: str | None = option(None, "folder of the run (default: output/RECIPE/TIME, or that of --resume)")
    resume: str | None = option(None, "checkpoint to go on from; 'auto' is last.pt of --output-dir, if there")
    checkpoint: str | None = option(None, "test.py: checkpoint to evaluate")
    log_interval: int = option(50, "steps between two lines of progress where there is no terminal", low=1)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_TYPES = typing.get_type_hints(Config)
# what a network is built from
MODEL_FIELDS = "model num_classes in_channels time_steps attention mlp_ratio shortcut residual ssa_membrane".split()
# what belongs to a machine or a command and not to the run; a checkpoint brings along all the rest
LOCAL_FIELDS = "config lif_backend workers device threads output_dir resume checkpoint log_interval".split()


def load(yaml_path: str | Path, argv: Sequence[str] = (), recorded: Mapping[str, object] | None = None) -> Config:
    """Read a recipe and the flags over it.

    Args:
        yaml_path: the recipe; `--config FILE` among the flags replaces it.
        argv: command line without the program's name.
        recorded: values that a checkpoint recorded; they beat the recipe, and flags beat them.

    Raises:
        UserError: unknown key (the nearest valid one is named), wrong type or value out of range.
    """
    flags = _read_flags(argv)
    path = Path(flags.get("config", yaml_path))
    recorded = {key: value for key, value in (recorded or {}).items() if key in FIELDS and key not in LOCAL_FIELDS}
    recorded = {key: _coerce(key, value, f"{key} in the checkpoint") for key, value in recorded.items()}
    values = _read_yaml(path) | recorded | flags | {"config": str(path)}
    config = _validated(Config(**values))
    return dataclasses.replace(config, model=config.model.lower())  # the released code writes QKFormer_10_384


def plain(config: Config, without: Sequence[str] = ()) -> dict[str, object]:
    """The settings as plain data for YAML, JSON and checkpoints, `without` some."""
    values = {key: value for key, value in vars(config).items() if key not in without}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which lets the last of two equal keys win, made to refuse them."""

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        content = yaml.load(path.read_text(), _StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read the recipe {path}: {reason}") from None
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError) as error:
        line = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        reason = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}{line}: not valid YAML ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(content).__name__}")
    for key in content:
        if key not in FIELDS or key == "config":
            raise UserError(f"{path}: unknown key {key!r}{_nearest(str(key), FIELDS)}")
    return {key: _coerce(key, value, f"{path}: {key}") for key, value in content.items()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def _read_flags(argv: Sequence[str]) -> dict[str, object]:
    argv = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    parser = _Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for key, field in FIELDS.items():
        spellings = [f"--{key.replace('_', '-')}", *field.metadata["flags"]]
        default = "" if field.default in (None, "") else f" [{field.default}]"
        kwargs = {"dest": key, "help": (field.metadata["help"] + default).replace("%", "%%")}
        if _TYPES[key] is bool:
            parser.add_argument(*spellings, action=argparse.BooleanOptionalAction, **kwargs)
        else:
            nargs = "+" if _is_tuple(_TYPES[key]) else None
            parser.add_argument(*spellings, nargs=nargs, metavar="|".join(field.metadata["choices"]) or "X", **kwargs)
    # torch.distributed.launch passes it; the environment variable LOCAL_RANK is what counts
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        if flag.startswith("-"):
            raise UserError(f"unknown flag {flag}{_nearest(flag, [f'--{key}'.replace('_', '-') for key in FIELDS])}")
        raise UserError(f"unexpected argument {flag!r} (--help lists the flags)")
    raw = {key: value for key, value in vars(parsed).items() if key != "local_rank"}
    return {key: _coerce(key, value, f"--{key.replace('_', '-')}") for key, value in raw.items()}


def _is_tuple(kind) -> bool:
    return any(typing.get_origin(k) is tuple for k in (kind, *typing.get_args(kind)))


def _coerce(key: str, value: object, where: str) -> object:
    """`value` as the type of the field `key`; PyYAML reads 1e-3 as a string, and so comes every flag."""
    kind = _TYPES[key]
    if isinstance(kind, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        items = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
        return tuple(_scalar(typing.get_args(kind)[0], item, where) for item in items)
    return _scalar(kind, value, where)


def _scalar(kind: type, value: object, where: str) -> object:
    try:
        if kind in (bool, str):
            if isinstance(value, kind):
                return value
        elif isinstance(value, int | float | str) and not isinstance(value, bool):
            number = kind(value)
            if isinstance(value, str) or number == value or math.isnan(number):
                return number
    except (ValueError, OverflowError):
        pass
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise UserError(f"{where}: {value!r} is not {names[kind]}")


def _validated(config: Config) -> Config:
    for key, field in FIELDS.items():
        rules = field.metadata
        value = getattr(config, key)
        for item in value if isinstance(value, tuple) else (value,):
            if item is None:
                continue
            if rules["choices"] and item not in rules["choices"]:
                raise _bad(config, key, f"choose one of {', '.join(rules['choices'])}")
            if isinstance(item, float) and not math.isfinite(item):
                raise _bad(config, key, "not a finite number")
            if rules["low"] is not None and item < rules["low"]:
                raise _bad(config, key, f"must be at least {rules['low']}")
            if rules["high"] is not None and item > rules["high"]:
                raise _bad(config, key, f"must be at most {rules['high']}")
    for key in ("scale", "ratio"):
        if len(getattr(config, key)) != 2:
            raise _bad(config, key, "needs two numbers, from and to")
        if getattr(config, key)[0] > getattr(config, key)[1]:
            raise _bad(config, key, "the first number must not be above the second")
    for key in ("mean", "std"):
        if len(getattr(config, key)) != config.in_channels:
            raise _bad(config, key, f"needs one number per channel (in_channels is {config.in_channels})")
    if config.lr is None and config.blr is None:
        raise _bad(config, "lr", "set lr, or blr to scale with the batch")
    if config.warmup_prefix and config.warmup_epochs >= config.epochs:
        raise _bad(config, "warmup_epochs", f"must be below epochs ({config.epochs})")
    if config.mixup and config.batch_size % 2:
        raise _bad(config, "batch_size", "mixup pairs the images of a batch: must be even")
    return config


def _bad(config: Config, key: str, why: str) -> UserError:
    return UserError(f"{key} = {getattr(config, key)!r}: {why} (recipe {config.config} and flags)")


def _nearest(word: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1)
    return f", did you mean {close[0]!r}?" if close else " (--help lists them)"
