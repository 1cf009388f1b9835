"""Configuration: the defaults of `settings`, then the recipe (YAML), then a checkpoint's record, then flags.

Each field of `Config` is a YAML key and a flag. The key `variants` of a recipe lists names with their changes.
"""

import argparse
import dataclasses
import difflib
import functools
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from . import settings
from .cli import UserError, short
from .settings import FIELDS, Config, MachineSettings, ModelSettings, Published, mixes, names, plain

__all__ = ["FIELDS", "Config", "load", "mixes", "plain"]
_TYPES = typing.get_type_hints(Config)
MODEL_FIELDS, LOCAL_FIELDS, PUBLISHED = names(ModelSettings), names(MachineSettings), names(Published)
ALIASES = {flag.lstrip("-").replace("-", "_"): key for key, field in FIELDS.items() for flag in field.metadata["flags"]}
LAUNCHERS = "local_rank world_size dist_url dist_on_itp dist_eval".split()
NETWORK = "depths layer num_heads patch_size dim embed_dims sr_ratios qkv_bias".split()  # here in the network's name
IGNORED = [  # keys and flags of the released scripts and of timm's without effect here, or there
    *"log_dir start_epoch pin_mem no_pin_mem global_pool cls_token resplit experiment eval_metric gp".split(),
    *"model_ema_decay recovery_interval checkpoint_hist log_wandb worker_seeding dist_bn clip_mode".split(),
    *(LAUNCHERS + NETWORK),
]
IF_OFF = (  # keys of what is missing here: off there if null, false, 0 or empty
    "aug_repeats aug_splits bce_loss both_membranes drop drop_block drop_connect jsd_loss model_ema native_amp "
    "apex_amp no_aug output pretrained save_images split_bn torchscript tta vflip"
).split()


@dataclasses.dataclass(frozen=True)
class Sources:
    """Settings over the defaults: a recipe with its variants, and flags. `read` makes it."""

    path: Path
    recipes: dict[str | None, dict[str, object]]  # of each variant, and of None, the recipe itself
    flags: dict[str, object]
    script_recipe: Path
    ignored: list[str]  # keys and flags without effect

    def config(self, recorded: Mapping[str, object] | None = None, validate: bool = True) -> Config:
        """Merge the sources: settings `recorded` in a checkpoint beat the recipe, and flags beat them."""
        keys = [key for key in recorded or () if key in FIELDS and key not in LOCAL_FIELDS]
        recorded = {key: _coerce(key, recorded[key], f"{key} in the checkpoint") for key in keys}
        variant = self.flags.get("variant")
        if variant not in self.recipes:
            raise UserError(f"--variant {variant}: {self.path} lists {', '.join(list(self.recipes)[1:]) or 'none'}")
        config = Config(**self.recipes[variant] | recorded | self.flags | {"config": str(self.path)})
        for key, problem in (*settings.out_of_range(config), *(settings.conflicts(config) if validate else ())):
            raise UserError(f"{key} = {short(getattr(config, key))}: {problem} (recipe {config.config} and flags)")
        return dataclasses.replace(config, model=config.model.lower())  # the released code writes QKFormer_10_384

    def all(self) -> list[Config]:
        """Return the recipe itself, then each of its variants, without flags."""
        return [dataclasses.replace(self, flags={"variant": name}).config() for name in self.recipes]


def read(yaml_path: str | Path, argv: Sequence[str] = ()) -> Sources:
    """Read a recipe, or the one that `--config` in `argv` names: a file, or a recipe in the same folder."""
    (flags, ignored, is_help), recipe = _read_flags(argv), Path(yaml_path)
    path = Path(flags.get("config", recipe))
    sibling = recipe.parent / (path if path.suffix else f"{path}.yml")
    if not os.path.isfile(path) and (os.path.isfile(sibling) or not path.suffix):
        path = sibling
    sources = Sources(path, _read_yaml(path, ignored), flags, recipe, ignored)
    if is_help:
        print_help(sources)
    return sources


def load(yaml_path: str | Path, argv: Sequence[str] = (), recorded=None, validate: bool = True) -> Config:
    """Return the settings of a recipe under flags; see `read` and `Sources.config`."""
    return read(yaml_path, argv).config(recorded, validate)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader; duplicate keys are an error."""

    def construct_mapping(self, node, deep=False):
        for i, (key, _) in enumerate(node.value):
            if key.value in [other.value for other, _ in node.value[:i]]:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {short(key.value)}", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, ignored: list[str]) -> dict[str | None, dict[str, object]]:
    """Return the settings of a recipe, under None, and of each of its variants; collect keys without effect."""
    if not os.path.isfile(path):  # a pipe or a device may have no end
        names = ", ".join(sorted(p.name for p in path.parent.glob("*.yml")))
        raise UserError(f"{path}: no such recipe; use {names or 'a file, such as cifar10/cifar10.yml'}")
    try:
        content = yaml.load(path.read_bytes(), _UniqueKeyLoader)
    except Exception as error:  # PyYAML raises errors of many kinds
        raise UserError(f"{path}: not valid YAML ({error or type(error).__name__})") from None
    variants = content.pop("variants", {}) if isinstance(content, dict) else {}
    if not isinstance(variants, dict):
        raise UserError(f"{path}: variants is a {type(variants).__name__}; write `name: changes` lines")
    recipes = {None: _settings(content, path, str(path), ignored)}
    shared = {key: value for key, value in recipes[None].items() if key not in PUBLISHED}  # figures of the recipe alone
    for name, changes in variants.items():
        recipes[str(name)] = shared | _settings(changes, path, f"{path}: variant {name}", ignored)
    return recipes


def _settings(content: object, path: Path, where: str, ignored: list[str]) -> dict[str, object]:
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}; write `key: value` lines")
    match content.get("input_size"):
        case [channels, height, width] if height == width:  # as timm writes it
            content = content | {"in_channels": channels, "input_size": height}
    values, unknown = {}, []
    for name, value in content.items():
        key = ALIASES.get(name, name)
        is_dead = name == "drop_path" and content.keys() & set(NETWORK)  # the released code reads none
        is_empty = value is None and name not in FIELDS and not isinstance(_TYPES.get(key), types.UnionType)
        if name in IGNORED or is_dead or (not value if name in IF_OFF else is_empty):
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
    """A command line that raises `UserError`, with flags in both spellings, `--batch-size` and `--batch_size`."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in args]
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _read_flags(argv: Sequence[str]) -> tuple[dict[str, object], list[str], bool]:
    """Return the settings of a command line, its flags without effect, and True if it asks for help."""
    parser = Parser(allow_abbrev=False, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", dest="is_help")
    add_flags(parser, FIELDS)
    for key in IGNORED:
        parser.add_argument(_flag(key), help=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs="?")
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown[:1]
        known = [_flag(key) for key in (*FIELDS, *ALIASES)]
        raise UserError(f"{', '.join(flag + _nearest(flag, known) for flag in flags)}: unknown; --help lists the flags")
    ignored = [_flag(key) for key in vars(parsed) if key in IGNORED and key not in LAUNCHERS]
    return settings_in(parsed), ignored, parsed.is_help


def add_flags(parser: argparse._ActionsContainer, keys: Iterable[str], values: Config | None = None) -> None:
    """Add the flags of some fields; for a help text only the first name of each, with `values` as defaults."""
    for key in keys:
        rules, value = FIELDS[key].metadata, getattr(values or Config(), key)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        about = rules["help"] + ("" if shown in (None, "") else f" [{shown}]")
        kwargs = {"dest": key, "default": argparse.SUPPRESS, "help": about.replace("%", "%%")}
        if _TYPES[key] is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs |= {
                "metavar": "|".join(rules["choices"]) or "X",
                "nargs": "+" if "tuple" in str(_TYPES[key]) else None,
            }
        if rules["choices"] == settings.AMP:
            kwargs |= {"nargs": "?", "const": True}
        parser.add_argument(_flag(key), *(() if values else rules["flags"]), **kwargs)


def print_help(sources: Sources) -> None:
    """Print the flags that the script reads, with the settings of `sources` as defaults, and exit."""
    script = "test" if Path(sys.argv[0]).stem == "test" else "train"
    sentence, *examples = settings.HELP[script]
    command, config = f"    python {sources.script_recipe.parent.name}/{script}.py", sources.flags.get("config")
    command += f" --config {config}" if config else ""
    examples = [f"{command} {flags.format(sources.path.stem)}" for flags in examples]
    lines = [sentence, "", *examples, "", f"[Values] are those of {sources.path}."]
    if variants := ", ".join(list(sources.recipes)[1:]):
        lines += textwrap.wrap(f"Its variants (--variant): {variants}.", 120)
    style = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=120)
    parser = Parser(usage=argparse.SUPPRESS, description="\n".join(lines), formatter_class=style)
    for title, keys in settings.groups(script).items():
        add_flags(parser.add_argument_group(title), keys, sources.config(validate=False))
    parser.print_help()
    sys.exit()


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
