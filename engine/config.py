"""Typed configuration: the defaults of `settings`, then the recipe (YAML), then what a checkpoint recorded, then flags.

Each field of `Config` is a YAML key and a flag (`--batch-size` and `--batch_size`) alike. A recipe may list variants of
itself under the key `variants`, each a name with what it changes; `--variant NAME` takes one.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from .cli import UserError
from .settings import Config

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_TYPES = typing.get_type_hints(Config)
# what a network is built from
MODEL_FIELDS = (
    "model num_classes in_channels time_steps attention mlp_ratio shortcut embed ssa_scale residual ssa_membrane"
).split()
# what belongs to a machine or a command and not to the run; a checkpoint brings along all the rest
LOCAL_FIELDS = (
    "config lif_backend data_path download workers tf32 cudnn_benchmark pack_spikes compile cuda_graphs device "
    "threads output_dir resume finetune checkpoint eval both_membranes energy use_ema log_interval"
).split()
PUBLISHED = ("paper_top1", "log_top1", "paper_energy_mj")
EVENT_DATASETS = ("digits-dvs", "dvs128-gesture", "cifar10-dvs")
# settings that mean something for images alone
IMAGE_FIELDS = (
    "mean std interpolation scale ratio color_jitter reprob remode recount crop_pct cutmix cutmix_minmax "
    "mixup_switch_prob train_split val_split"
).split()
LONGEST_RECIPE = 100_000  # characters; ours have 2,000
# flags of the released scripts and of launchers that change nothing here, and how many values each takes
IGNORED = {
    "--local-rank": 1,  # of torch.distributed.launch; the environment variable LOCAL_RANK is what counts
    "--world-size": 1,
    "--dist-url": 1,
    "--dist-on-itp": 0,
    "--dist-eval": 0,  # evaluation is always shared
    "--pin-mem": 0,
    "--no-pin-mem": 0,
    "--global-pool": 0,
    "--cls-token": 0,
    "--log-dir": 1,  # TensorBoard writes to the folder of the run
    "--start-epoch": 1,  # a checkpoint knows its epoch
    "--resplit": 0,
}


def load(
    yaml_path: str | Path,
    argv: Sequence[str] = (),
    recorded: Mapping[str, object] | None = None,
    validate: bool = True,
) -> Config:
    """Read a recipe and the flags over it.

    Args:
        yaml_path: the recipe; `--config FILE` among the flags replaces it, which may also be the name of a recipe
            beside `yaml_path`.
        argv: command line without the program's name.
        recorded: values that a checkpoint recorded; they beat the recipe, and flags beat them.
        validate: False leaves open whether the settings go together, where `recorded` is yet to be read.

    Raises:
        UserError: unknown key (the nearest valid one is named), wrong type or value out of range.
    """
    flags = _read_flags(argv)
    path = _recipe_path(Path(yaml_path), flags.get("config"))
    recorded = {key: value for key, value in (recorded or {}).items() if key in FIELDS and key not in LOCAL_FIELDS}
    recorded = {key: _coerce(key, value, f"{key} in the checkpoint") for key, value in recorded.items()}
    values, variants = _read_yaml(path)
    if "variant" in recorded and (named := flags.get("variant", recorded["variant"])) != recorded["variant"]:
        raise UserError(
            f"--variant {named}: the checkpoint is of {recorded['variant'] or 'the recipe itself'}; omit it"
        )
    if "variant" in flags:
        if flags["variant"] not in variants:
            raise UserError(f"--variant {flags['variant']}: {path} lists {', '.join(variants) or 'none'}")
        own = {key: value for key, value in values.items() if key not in PUBLISHED}
        values = own | variants[flags["variant"]]  # which was published with a figure of its own, or with none
    values = values | recorded | flags | {"config": str(path)}
    config = Config(**values)
    _check_each(config)
    if validate:
        _check_together(config)
    return dataclasses.replace(config, model=config.model.lower())  # the released code writes QKFormer_10_384


def variants(yaml_path: Path) -> list[str]:
    """Names of the variants that a recipe lists; raises `UserError` as `load` does."""
    return list(_read_yaml(yaml_path)[1])


def mixes(config: Config) -> bool:
    """Whether images of a batch are mixed, by mixup or cutmix."""
    return bool(config.mixup or config.cutmix or config.cutmix_minmax)


def plain(config: Config, without: Sequence[str] = ()) -> dict[str, object]:
    """The settings as plain data for YAML, JSON and checkpoints, `without` some."""
    values = {key: value for key, value in vars(config).items() if key not in without}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _recipe_path(own: Path, named: str | None) -> Path:
    """The recipe beside the script, or the one that `--config` names: a file, or the name of one beside the script."""
    if named is None or os.path.isfile(named):
        return Path(named or own)
    beside = own.parent / (named if Path(named).suffix else f"{named}.yml")
    return beside if os.path.isfile(beside) else Path(named)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, made to refuse what a recipe does not need.

    That is two equal keys, the last of which would win, and aliases and merge keys, with which a few lines can unfold
    to more than any memory holds.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            name = short(self.peek_event().anchor)
            raise yaml.composer.ComposerError(None, None, f"alias {name}, write it out", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key, _ in node.value:
            if key.value in keys or key.tag == "tag:yaml.org,2002:merge":
                reason = "merge key, write it out" if key.value == "<<" else f"{short(key.value)} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, reason, key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """The settings of a recipe, and what each of its variants changes."""
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # others may have no end, or wait for one who writes
            raise UserError(f"cannot read the recipe {path}: not a file")
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST_RECIPE + 1)
    except (OSError, ValueError) as error:  # the latter: not UTF-8, or a name with a zero byte
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read the recipe {path}: {reason}") from None
    if len(text) > LONGEST_RECIPE:
        raise UserError(f"cannot read the recipe {path}: longer than {LONGEST_RECIPE:,} characters")
    try:
        content = yaml.load(text, _StrictLoader)
    except Exception as error:  # PyYAML raises whatever its parts do
        line = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        reason = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}{line}: not valid YAML ({reason})") from None
    variants = content.pop("variants", {}) if isinstance(content, dict) else {}
    if not isinstance(variants, dict):
        raise UserError(f"{path}: variants: expected `name: what it changes`, found {type(variants).__name__}")
    return (
        _settings(content, path, str(path)),
        {str(name): _settings(changes, path, f"{path}: variant {name}") for name, changes in variants.items()},
    )


def _settings(content: object, path: Path, where: str) -> dict[str, object]:
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected `key: value` lines, found {type(content).__name__}")
    for key in content:
        if key not in FIELDS or key in ("config", "variant"):
            raise UserError(f"{where}: unknown key {short(key)}{_nearest(str(key), FIELDS)}")
    values = {key: _coerce(key, value, f"{where}: {key}") for key, value in content.items()}
    if values.get("data_path") and ":" not in values["data_path"]:  # not the address of shards
        values["data_path"] = os.path.abspath(path.parent / os.path.expanduser(values["data_path"]))
    return values


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes raise `UserError`."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def _read_flags(argv: Sequence[str]) -> dict[str, object]:
    argv = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for key, field in FIELDS.items():
        spellings = [f"--{key.replace('_', '-')}", *field.metadata["flags"]]
        default = "" if field.default in (None, "") else f" [{field.default}]"
        kwargs = {"dest": key, "help": (field.metadata["help"] + default).replace("%", "%%")}
        if _TYPES[key] is bool:
            parser.add_argument(*spellings, action=argparse.BooleanOptionalAction, **kwargs)
        else:
            nargs = "+" if _is_tuple(_TYPES[key]) else None
            parser.add_argument(*spellings, nargs=nargs, metavar="|".join(field.metadata["choices"]) or "X", **kwargs)
    for flag, values in IGNORED.items():
        kind = {"metavar": "X"} if values else {"action": "store_true"}
        parser.add_argument(flag, help=argparse.SUPPRESS, dest=f"ignored{flag}", **kind)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        if flag.startswith("-"):
            raise UserError(f"unknown flag {flag}{_nearest(flag, [f'--{key}'.replace('_', '-') for key in FIELDS])}")
        raise UserError(f"unexpected argument {short(flag)} (--help lists the flags)")
    raw = {key: value for key, value in vars(parsed).items() if key in FIELDS}
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
            if isinstance(value, kind) and value != "" and b"\0" not in str(value).encode():  # UTF-8, as the records
                return value
        elif isinstance(value, int | float | str) and not isinstance(value, bool):
            number = kind(value)
            if isinstance(value, str) or number == value or math.isnan(number):
                return number
    except (ValueError, OverflowError):
        pass
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise UserError(f"{where}: {short(value)} is not {names[kind]}")


def _check_each(config: Config) -> None:
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


def _check_together(config: Config) -> None:
    for key in ("scale", "ratio", "cutmix_minmax"):
        bounds = getattr(config, key)
        if bounds is not None and len(bounds) != 2:
            raise _bad(config, key, "needs two numbers, from and to")
        if bounds is not None and bounds[0] > bounds[1]:
            raise _bad(config, key, "the first number must not be above the second")
    if config.dataset in EVENT_DATASETS:
        _check_events(config)
    else:
        for key in ("mean", "std"):
            values = getattr(config, key)
            if (3 if values is None else len(values)) != config.in_channels:  # ImageNet's have 3
                raise _bad(config, key, f"needs one number per channel (in_channels is {config.in_channels})")
    if config.split_seed is not None and config.dataset != "cifar10-dvs":
        raise _bad(config, "split_seed", f"{config.dataset} comes in two parts; only cifar10-dvs is split here")
    if config.lr is None and config.blr is None:
        raise _bad(config, "lr", "set lr, or blr to scale with the batch")
    if config.warmup_prefix and config.warmup_epochs >= config.epochs:
        raise _bad(config, "warmup_epochs", f"must be below epochs ({config.epochs})")
    if mixes(config) and config.batch_size % 2:
        raise _bad(config, "batch_size", "mixup pairs the images of a batch: must be even")
    if config.compile and config.lif_backend not in ("auto", "torch"):
        raise _bad(config, "lif_backend", "does not go together with compile; use auto or torch")
    if config.pack_spikes and (config.compile or config.residual == "ms" or config.lif_backend in ("torch", "cupy")):
        raise _bad(
            config, "pack_spikes", "needs lif_backend auto or triton, residual sew, and no compile; leave it out"
        )
    if config.cuda_graphs:
        _check_cuda_graphs(config)


def _check_cuda_graphs(config: Config) -> None:
    if config.compile:
        raise _bad(config, "cuda_graphs", "does not go together with compile; choose one")
    if config.lif_backend == "cupy":
        raise _bad(config, "lif_backend", "does not go together with cuda_graphs; use auto or triton")
    if config.grad_checkpointing and config.drop_path:
        raise _bad(config, "drop_path", "cannot be drawn again under cuda_graphs with grad_checkpointing; choose two")


def _check_events(config: Config) -> None:
    for key in IMAGE_FIELDS:
        if getattr(config, key) != FIELDS[key].default:
            raise _bad(config, key, f"is for images; {config.dataset} has event frames")
    if config.auto_augment not in (None, "snn-wide"):
        raise _bad(config, "auto_augment", "event frames have snn-wide, or none")
    if config.mixup and config.mixup_in != "step":
        raise _bad(config, "mixup_in", "event frames are mixed in the training step: set it to step")


def _bad(config: Config, key: str, why: str) -> UserError:
    return UserError(f"{key} = {short(getattr(config, key))}: {why} (recipe {config.config} and flags)")


def _nearest(word: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1)
    return f", did you mean {close[0]!r}?" if close else " (--help lists them)"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 100, 100


def short(value: object) -> str:
    """All of an ordinary value, and the beginning of one that would fill the screen, or the memory."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
