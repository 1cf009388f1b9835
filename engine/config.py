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
IGNORED = (  # flags of the released scripts and of launchers without effect here
    "--local-rank --world-size --dist-url --log-dir --start-epoch "
    "--dist-on-itp --dist-eval --pin-mem --no-pin-mem --global-pool --cls-token --resplit"
).split()


@dataclasses.dataclass(frozen=True)
class Sources:
    """Settings over the defaults: a recipe with its variants, and flags. `read` makes it."""

    path: Path
    recipes: dict[str | None, dict[str, object]]  # of each variant, and of None, the recipe itself
    flags: dict[str, object]
    folder: Path  # of the script

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
        UserError: unknown key (with the nearest valid one), or wrong type.
    """
    flags, folder = _read_flags(argv), Path(yaml_path).parent
    path = Path(flags.get("config", yaml_path))
    sibling = folder / (path if path.suffix else f"{path}.yml")
    if not os.path.isfile(path) and os.path.isfile(sibling):
        path = sibling
    return Sources(path, _read_yaml(path), flags, folder)


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


def _read_yaml(path: Path) -> dict[str | None, dict[str, object]]:
    """Return the settings of a recipe, under None, and of each of its variants."""
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
    recipe = _settings(content, path, str(path))
    shared = {key: value for key, value in recipe.items() if key not in PUBLISHED}  # figures of the recipe alone
    changed = {str(name): _settings(changes, path, f"{path}: variant {name}") for name, changes in variants.items()}
    return {None: recipe} | {name: shared | changes for name, changes in changed.items()}


def _settings(content: object, path: Path, where: str) -> dict[str, object]:
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}; write `key: value` lines")
    for key in content:
        if key not in FIELDS or key in ("config", "variant"):
            raise UserError(f"{where}: unknown key {short(key)}{_nearest(str(key), FIELDS)}")
    values = {key: _coerce(key, value, f"{where}: {key}") for key, value in content.items()}
    if values.get("data_path") and ":" not in values["data_path"]:  # else the address of shards
        values["data_path"] = os.path.abspath(path.parent / os.path.expanduser(values["data_path"]))
    return values


class Parser(argparse.ArgumentParser):
    """A command line that raises `UserError`."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _read_flags(argv: Sequence[str]) -> dict[str, object]:
    argv = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    note = "The engine's defaults are in [brackets]; the recipe (YAML), then a checkpoint, then flags override them."
    parser = Parser(allow_abbrev=False, epilog=note)
    add_flags(parser, FIELDS)
    parser.add_argument(*IGNORED, help=argparse.SUPPRESS, dest="ignored", nargs="?")
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"{flag}: unknown flag{_nearest(flag, map(_flag, FIELDS))}")
    return settings_in(parsed)


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
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f", did you mean {close[0]!r}?" if close else " (--help lists them)"


def _coerce(key: str, value: object, where: str) -> object:
    """Convert `value` to the type of the field `key`; flags are strings, as is 1e-3 for PyYAML."""
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
