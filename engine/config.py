"""Typed configuration: the defaults of `settings`, then the recipe (YAML), then a checkpoint's record, then flags.

Each field of `Config` is a YAML key and a flag (`--batch-size` and `--batch_size`) alike. A recipe may list variants of
itself under the key `variants`, each a name with its changes; `--variant NAME` takes one.
"""

import argparse
import dataclasses
import difflib
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from .cli import UserError, short
from .settings import FIELDS, Config, MachineSettings, ModelSettings, Published, conflicts, mixes, names

__all__ = ["FIELDS", "Config", "load", "mixes"]
_TYPES = typing.get_type_hints(Config)
MODEL_FIELDS, LOCAL_FIELDS, PUBLISHED = names(ModelSettings), names(MachineSettings), names(Published)
ALIASES = {flag.lstrip("-").replace("-", "_"): key for key, field in FIELDS.items() for flag in field.metadata["flags"]}
LAUNCHERS = "local_rank world_size dist_url dist_on_itp dist_eval".split()
NETWORK = "depths layer num_heads patch_size dim embed_dims sr_ratios qkv_bias".split()  # here in the network's name
IGNORED = (  # keys and flags of the released scripts and of timm's without effect here, or there
    "log_dir start_epoch pin_mem no_pin_mem global_pool cls_token resplit experiment eval_metric gp model_ema_decay "
    "recovery_interval checkpoint_hist log_wandb worker_seeding dist_bn clip_mode"
).split()
IGNORED += LAUNCHERS + NETWORK
IF_OFF = (  # timm's keys of what is missing here: off there if null, false, 0 or empty
    "aug_repeats aug_splits bce_loss drop drop_block drop_connect jsd_loss model_ema native_amp apex_amp no_aug output "
    "pretrained save_images split_bn torchscript tta vflip"
).split()


@dataclasses.dataclass(frozen=True)
class Sources:
    """Settings over the defaults: a recipe with its variants, and flags. `read` makes it."""

    path: Path
    recipes: dict[str | None, dict[str, object]]  # of each variant, and of None, the recipe itself
    flags: dict[str, object]
    script_recipe: Path
    ignored: list[str]  # keys and flags without effect

    @property
    def folder(self) -> Path:
        """Return the folder of the script."""
        return self.script_recipe.parent

    def config(self, recorded: Mapping[str, object] | None = None, validate: bool = True) -> Config:
        """Merge the sources.

        Args:
            recorded: settings in a checkpoint; they beat the recipe, and flags beat them.
            validate: check settings against each other; False before `recorded` is known.

        Raises:
            UserError: a value out of range, or settings that conflict.
        """
        recorded = {key: value for key, value in (recorded or {}).items() if key in FIELDS and key not in LOCAL_FIELDS}
        recorded = {key: _coerce(key, value, f"{key} in the checkpoint") for key, value in recorded.items()}
        variant = self.flags.get("variant")
        if variant not in self.recipes:
            raise UserError(f"--variant {variant}: {self.path} lists {', '.join(list(self.recipes)[1:]) or 'none'}")
        config = Config(**self.recipes[variant] | recorded | self.flags | {"config": str(self.path)})
        problems = itertools.chain(_out_of_range(config), conflicts(config) if validate else ())
        for key, problem in problems:
            raise UserError(f"{key} = {short(getattr(config, key))}: {problem} (recipe {config.config} and flags)")
        return dataclasses.replace(config, model=config.model.lower())  # the released code writes QKFormer_10_384

    def all(self) -> list[Config]:
        """Return the recipe itself, then each of its variants, without flags."""
        return [dataclasses.replace(self, flags={"variant": name}).config() for name in self.recipes]


def read(yaml_path: str | Path, argv: Sequence[str] = ()) -> Sources:
    """Read a recipe and a command line.

    Args:
        yaml_path: the recipe. `--config` replaces it by another file, or by a recipe in the same folder.
        argv: command line without the program's name.

    Raises:
        UserError: unknown keys (with the nearest valid ones), or wrong type.
    """
    (flags, ignored), folder = _read_flags(argv), Path(yaml_path).parent
    path = Path(flags.get("config", yaml_path))
    sibling = folder / (path if path.suffix else f"{path}.yml")
    if not os.path.isfile(path) and os.path.isfile(sibling):
        path = sibling
    return Sources(path, _read_yaml(path, ignored), flags, Path(yaml_path), ignored)


def load(yaml_path: str | Path, argv: Sequence[str] = (), recorded=None, validate: bool = True) -> Config:
    """Return the settings of a recipe under flags; see `read` and `Sources.config`."""
    return read(yaml_path, argv).config(recorded, validate)


def _out_of_range(config: Config) -> Iterator[tuple[str, str]]:
    """Yield each setting with a value that its field does not allow, and the fix."""
    for key, field in FIELDS.items():
        value, rules = getattr(config, key), field.metadata
        for item in value if isinstance(value, tuple) else (value,) if value is not None else ():
            if rules["choices"] and item not in rules["choices"]:
                yield key, f"choose one of {', '.join(rules['choices'])}"
            if isinstance(item, float) and not math.isfinite(item):
                yield key, "must be finite"
            if rules["low"] is not None and item < rules["low"]:
                yield key, f"must be at least {rules['low']}"
            if rules["high"] is not None and item > rules["high"]:
                yield key, f"must be at most {rules['high']}"


def plain(config: Config, without: Collection[str] = ()) -> dict[str, object]:
    """Return the settings as plain data for YAML, JSON and checkpoints."""
    values = {key: value for key, value in vars(config).items() if key not in without}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would keep the last of duplicate keys; this one raises."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in reversed(node.value):
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {short(key.value)}", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, ignored: list[str]) -> dict[str | None, dict[str, object]]:
    """Return the settings of a recipe, under None, and of each of its variants; collect keys without effect."""
    if not os.path.isfile(path):  # a pipe or a device may have no end
        raise UserError(f"{path}: no such recipe")
    try:
        with path.open("rb") as file:
            content = yaml.load(file, _UniqueKeyLoader)
    except Exception as error:  # PyYAML raises errors of many kinds
        raise UserError(f"{path}: not valid YAML ({error or type(error).__name__})") from None
    variants = content.pop("variants", {}) if isinstance(content, dict) else {}
    if not isinstance(variants, dict):
        raise UserError(f"{path}: variants is a {type(variants).__name__}; write `name: changes` lines")
    recipe = _settings(content, path, str(path), ignored)
    shared = {key: value for key, value in recipe.items() if key not in PUBLISHED}  # figures of the recipe alone
    return {None: recipe} | {
        str(name): shared | _settings(changes, path, f"{path}: variant {name}", ignored)
        for name, changes in variants.items()
    }


def _settings(content: object, path: Path, where: str, ignored: list[str]) -> dict[str, object]:
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}; write `key: value` lines")
    values, unknown = {}, []
    for name, value in content.items():
        key = ALIASES.get(name, name)
        is_dead = name == "drop_path" and content.keys() & set(NETWORK)  # the released code reads none
        is_empty = value is None and name not in FIELDS and not isinstance(_TYPES.get(key), types.UnionType)
        is_off = not value if name in IF_OFF else is_empty
        if name in IGNORED or is_dead or is_off:
            ignored.append(name)
        elif key not in FIELDS or key in ("config", "variant"):
            unknown.append(short(name) + _nearest(str(name), [*FIELDS, *ALIASES]))
        else:
            setting = _coerce(key, value, f"{where}: {name}")
            if key in values and values[key] != setting:
                same = [other for other in content if ALIASES.get(other, other) == key]
                raise UserError(f"{where}: {' and '.join(same)} name one setting, with two values; omit one")
            values[key] = setting
    if unknown:
        raise UserError(f"{where}: unknown {', '.join(unknown)}; --help lists the keys")
    if values.get("data_path") and ":" not in values["data_path"]:  # else the address of shards
        values["data_path"] = os.path.abspath(path.parent / os.path.expanduser(values["data_path"]))
    return values


class Parser(argparse.ArgumentParser):
    """A command line that raises `UserError`."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _read_flags(argv: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """Return the settings of a command line, and its flags without effect."""
    argv = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    note = "The engine's defaults are in [brackets]; the recipe (YAML), then a checkpoint, then flags override them."
    parser = Parser(allow_abbrev=False, epilog=note)
    add_flags(parser, FIELDS)
    for key in IGNORED:
        parser.add_argument(_flag(key), help=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs="?")
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown[:1]
        known = [_flag(key) for key in (*FIELDS, *ALIASES)]
        raise UserError(f"{', '.join(flag + _nearest(flag, known) for flag in flags)}: unknown; --help lists the flags")
    return settings_in(parsed), [_flag(key) for key in vars(parsed) if key in IGNORED and key not in LAUNCHERS]


def add_flags(parser: argparse.ArgumentParser, keys: Iterable[str]) -> None:
    """Add the flags of some fields; those that are not given leave nothing behind."""
    for key in keys:
        field, rules = FIELDS[key], FIELDS[key].metadata
        default = "" if field.default in (None, "") else f" [{field.default}]"
        kwargs = {"dest": key, "default": argparse.SUPPRESS, "help": (rules["help"] + default).replace("%", "%%")}
        if _TYPES[key] is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs["nargs"] = "+" if "tuple" in str(_TYPES[key]) else None
            kwargs["metavar"] = "|".join(rules["choices"]) or "X"
        parser.add_argument(_flag(key), *rules["flags"], **kwargs)


def settings_in(parsed: argparse.Namespace) -> dict[str, object]:
    """Return the settings among parsed flags, in the types of their fields."""
    return {key: _coerce(key, value, _flag(key)) for key, value in vars(parsed).items() if key in FIELDS}


def _nearest(word: str, valid: Iterable[str]) -> str:
    """Suggest a valid word; typing errors rarely change the first letter, other words often do."""
    start = word[: len(word) - len(word.lstrip("-")) + 1]
    close = difflib.get_close_matches(word, [other for other in valid if other.startswith(start)], 1, 0.75)
    return f" (did you mean {close[0]}?)" if close else ""


def _coerce(key: str, value: object, where: str) -> object:
    """Convert `value` to the type of the field `key`; flags are strings, as is 1e-3 for PyYAML."""
    kind = _TYPES[key]
    if isinstance(value, bool) and "off" in FIELDS[key].metadata["choices"]:  # timm's amp: true; YAML's off is false
        return "fp16" if value else "off"
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
            if isinstance(value, kind) and value != "" and b"\0" not in str(value).encode():  # records are UTF-8
                return value
        elif isinstance(value, int | float | str) and not isinstance(value, bool):
            number = kind(value)
            if isinstance(value, str) or number == value or math.isnan(number):
                return number
    except (ValueError, OverflowError):
        pass
    kinds = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    raise UserError(f"{where}: {short(value)} is not {kinds[kind]}")
