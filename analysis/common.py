"""What the scripts of the analyses share: their command line, a checkpoint's network with data, and tables."""

import argparse
import contextlib
import csv
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.cli import UserError, guard
from engine.config import Config, Parser, load
from engine.data.loaders import Data
from engine.run import build_model, create_data, load_weights, settings_of, setup
from engine.world import World

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "digits/digits.yml"
COLOURS = {"token": "tab:blue", "channel": "tab:green", "self": "tab:red"}  # of the attentions, in every picture


@dataclass
class Subject:
    """A trained network in evaluation mode, and the data set it was trained on."""

    path: Path  # of its checkpoint
    cfg: Config
    here: World
    model: nn.Module

    @functools.cached_property
    def data(self) -> Data:
        """Its test set; raises `UserError` as test.py does."""
        return create_data(self.cfg, self.here, train=False)

    def samples(self, count: int, spread: bool = False) -> tuple[Tensor, Tensor]:
        """At most `count` test samples [B,...] with their labels [B], on the device.

        They are the first, or with `spread` from all over the test set, which may lie class by class.
        """
        every, met, found = 1, 0, []
        for images, labels in self.data.test:
            if spread and not met:
                every = max(1, len(self.data.test) * len(labels) // count)
            found.append((images[-met % every :: every], labels[-met % every :: every]))
            met += len(labels)
            if sum(len(kept) for _, kept in found) >= count:
                break
        images, labels = (torch.cat(column)[:count] for column in zip(*found, strict=True))
        return images, labels


def parser(doc: str) -> argparse.ArgumentParser:
    """A command line that a script's docstring describes; mistakes in it raise `UserError`."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def checkpoint_parser(doc: str) -> argparse.ArgumentParser:
    """The same for a script that looks at checkpoints."""
    about = f"{doc}\nAll further flags are those of test.py, such as --data-path, --batch-size or --device."
    ours = parser(about)
    ours.add_argument(
        "--checkpoint", nargs="+", type=Path, required=True, help="what train.py wrote, or a released file"
    )
    ours.add_argument("--output-dir", type=Path, help="folder to write to (default: that of the first checkpoint)")
    return ours


def positive(text: str) -> int:
    """The `type` of a flag that takes a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def main(body: Callable[[Sequence[str]], None]) -> None:
    """Run a script: mistakes that the user can mend end in one line and exit code 2."""
    with guard():
        body(sys.argv[1:])


def subjects(args: argparse.Namespace, flags: Sequence[str]) -> list[Subject]:
    """The networks of `args.checkpoint`, and the folder `args.output_dir` made.

    Args:
        args: of a `checkpoint_parser`.
        flags: those that it did not know.

    Raises:
        UserError: as test.py; or nothing tells the recipe of a checkpoint.
    """
    args.output_dir = args.output_dir or args.checkpoint[0].parent
    found = [subject(path, flags) for path in args.checkpoint]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return found


def subject(path: Path, flags: Sequence[str]) -> Subject:
    """The network of a checkpoint with its data, under the flags of test.py; raises `UserError` as `subjects` does.

    Its neurons are torch's unless the flags say otherwise: the analyses look at modules that other backends skip.
    """
    state = checkpoint.read(path)
    flags = ["--lif-backend", "torch", *flags]
    recipe = _recipe_of(state, path, flags)
    here = setup(load(recipe, flags, validate=False))
    if here.world_size > 1:
        raise UserError("the analyses run in one process: start them with python -m")
    cfg = settings_of(state, path, recipe, flags)
    model = build_model(cfg).to(here.device).eval()
    load_weights(cfg, model, state, path)
    return Subject(path, cfg, here, model)


def _recipe_of(state: dict, path: Path, flags: Sequence[str]) -> Path:
    """The recipe for the data set that the checkpoint records, unless `--config` names one."""
    if any(flag.split("=")[0] == "--config" for flag in flags):
        return Path(load(DIGITS, flags, validate=False).config)
    for recipe, cfg in recipes() if state["format"] == "qkformer" else ():
        if cfg.dataset == state["config"].get("dataset"):
            return recipe
    raise UserError(f"{path} does not tell its data set: name a recipe, such as --config imagenet/qkformer_10_384.yml")


def recipes(folder: str = "*") -> Iterator[tuple[Path, Config]]:
    """The recipes beside the scripts, in one folder or all; a file of the user's that is none is passed over."""
    for path in sorted(ROOT.glob(f"{folder}/*.yml")):
        if (path.parent / "train.py").exists():
            with contextlib.suppress(UserError):
                yield path, load(path)


def short_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each checkpoint, different for all.

    Raises:
        UserError: there is none.
    """
    for names in ([path.parent.name for path in paths], [f"{path.parent.name}-{path.stem}" for path in paths]):
        if len(set(names)) == len(paths):
            return names
    raise UserError(f"--checkpoint: {len(paths)} files, of which some have equal names in folders of equal names")


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Rows with equal keys as a CSV file with a header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
