"""Shared parts of the analyses: command line, networks of checkpoints with their data, hooks, tables and figures."""

import argparse
import contextlib
import csv
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from engine import checkpoint
from engine.cli import UserError, guard
from engine.config import Config, Parser, load, read
from engine.data.loaders import Data
from engine.data.recordings import EVENT_DATASETS
from engine.log import progress
from engine.run import build_model, create_data, load_weights, settings_of, setup
from engine.world import World

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "digits/digits.yml"

Callback = Callable[[Tensor, Tensor], Tensor | None]  # gets a module's input and output; may return another output


@dataclass
class Subject:
    """Trained network in evaluation mode, with its data set."""

    path: Path  # of the checkpoint
    cfg: Config
    world: World
    model: nn.Module
    name: str = ""  # unique among the subjects of a script
    classes: Sequence[str] = ()  # names that the checkpoint records

    @functools.cached_property
    def data(self) -> Data:
        """Return the test set; raise `UserError` as test.py does."""
        return create_data(self.cfg, self.world, train=False)

    def samples(self, count: int, spread: bool = False) -> tuple[Tensor, Tensor]:
        """Return the first `count` test samples [B,...] with labels [B]; with `spread` evenly spaced ones."""
        every, seen, kept = 1, 0, []
        for images, labels in self.data.test:
            if spread and not seen:
                every = -(-len(self.data.test) * len(labels) // count)  # rounded up, to reach the last class
            kept.append((images[-seen % every :: every], labels[-seen % every :: every]))
            seen += len(labels)
            if sum(len(labels) for _, labels in kept) >= count:
                break
        images, labels = (torch.cat(column)[:count] for column in zip(*kept, strict=True))
        return images, labels

    @torch.inference_mode()
    def evaluate(self, callbacks: Mapping[nn.Module, Callback]) -> int:
        """Run the test set through the network under `hooked`; return the number of samples."""
        samples = 0
        with hooked(callbacks):
            for images, _ in progress(self.data.test, "samples", self.cfg.log_interval, self.world.is_main):
                self.model(images)
                samples += len(images)
        return samples

    def rebuilt(self, **changes) -> nn.Module:
        """Return the network under changed settings, with the same weights."""
        model = build_model(dataclasses.replace(self.cfg, **changes)).to(self.world.device).eval()
        model.load_state_dict(self.model.state_dict())
        return model


@contextlib.contextmanager
def hooked(callbacks: Mapping[nn.Module, Callback]) -> Iterator[None]:
    """Call each callback after the forward pass of its module, until the context ends."""
    with contextlib.ExitStack() as stack:
        for module, callback in callbacks.items():
            hook = functools.partial(lambda callback, _, args, output: callback(args[0], output), callback)
            stack.enter_context(module.register_forward_hook(hook))
        yield


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser that a script's docstring describes; wrong flags raise `UserError`."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def checkpoint_parser(doc: str, **checkpoint_argument) -> argparse.ArgumentParser:
    """Return a parser with `--checkpoint`, for `parse_known_args`; all other flags are those of test.py."""
    flags = parser(f"{doc}\nTakes all flags of test.py, such as --config, --dataset, --data-path or --device.")
    about = "file that train.py wrote; a released file needs --config"
    flags.add_argument("--checkpoint", type=Path, required=True, help=about, **checkpoint_argument)
    return flags


def positive(text: str) -> int:
    """Convert a flag's value to an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def main(body: Callable[[Sequence[str]], None]) -> None:
    """Run a script; user errors print one line and end with exit code 2."""
    with guard():
        body(sys.argv[1:])


def subjects(doc: str, argv: Sequence[str], **flags: dict) -> tuple[argparse.Namespace, list[Subject]]:
    """Parse the command line of an analysis with more `flags`, load its checkpoints and create its `--output-dir`."""
    command = checkpoint_parser(doc, nargs="+")
    command.add_argument("--output-dir", type=Path, help="folder to write to (default: that of the first checkpoint)")
    for flag, arguments in flags.items():
        command.add_argument(f"--{flag.replace('_', '-')}", **arguments)
    args, rest = command.parse_known_args(argv)
    names = zip(args.checkpoint, short_names(args.checkpoint), strict=True)
    loaded = [subject(path, rest, name) for path, name in names]
    args.output_dir = args.output_dir or args.checkpoint[0].parent
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args, loaded


def subject(path: Path, flags: Sequence[str], name: str = "") -> Subject:
    """Load the network of a checkpoint under the flags of test.py; raise `UserError` if no recipe is known."""
    state = checkpoint.read(path)
    flags = ["--lif-backend", "torch", *flags]  # other backends skip modules
    recipe = _recipe_of(state, path, flags)
    world = setup(load(recipe, flags, validate=False))
    if world.world_size > 1:
        raise UserError("WORLD_SIZE: the analyses run in one process; start them with python -m")
    cfg = settings_of(state, path, read(recipe, flags))
    model = build_model(cfg).to(world.device).eval()
    load_weights(cfg, model, state, path)
    return Subject(path, cfg, world, model, name, state.get("classes", ()))


def _recipe_of(state: dict, path: Path, flags: Sequence[str]) -> Path:
    """Return the recipe of `--config`, or the nearest one of the checkpoint's data set, or of the same kind of data."""
    if any(flag.split("=")[0] in ("--config", "-c") for flag in flags):
        return Path(load(DIGITS, flags, validate=False).config)
    if dataset := state["config"].get("dataset") if state["format"] == "qkformer" else None:
        kind = "cifar10-dvs/cifar10-dvs.yml" if dataset in EVENT_DATASETS else "imagenet/qkformer_10_384.yml"
        same = [(recipe, cfg) for recipe, cfg in recipes() if cfg.dataset == dataset]
        same.sort(key=lambda pair: (pair[1].model != state["config"].get("model"), pair[0].parent.name != "imagenet"))
        return same[0][0] if same else ROOT / kind
    raise UserError(
        f"{path}: does not record its data set; add --config with a recipe for it, such as cifar10/cifar10.yml"
    )


def recipes(folder: str = "*") -> Iterator[tuple[Path, Config]]:
    """Yield the recipes next to the scripts, in one folder or all; skip other files."""
    for path in sorted(ROOT.glob(f"{folder}/*.yml")):
        if (path.parent / "train.py").exists():
            with contextlib.suppress(UserError):
                yield path, load(path)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return a unique short name for each checkpoint; raise `UserError` if there is none."""
    for names in ([path.parent.name for path in paths], [f"{path.parent.name}-{path.stem}" for path in paths]):
        if len(set(names)) == len(paths):
            return names
    raise UserError("--checkpoint: two files share the names of file and folder; rename a folder")


def published(section: str) -> dict:
    """Return a section of published.yml, which has the published figures without a recipe."""
    return yaml.safe_load(Path(__file__).with_name("published.yml").read_text())[section]


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows with equal keys as a CSV file with a header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def drawing(
    path: Path, rows: int, columns: int, size: tuple[float, float], grid: str = "", **kwargs
) -> Iterator[tuple[Figure, list]]:
    """Yield a figure of `size` inches and its axes, row by row, then write it; `grid` is "x", "y" or "both"."""
    figure = Figure(figsize=size, layout="constrained")
    axes: list[Axes] = [*figure.subplots(rows, columns, squeeze=False, **kwargs).flat]
    for axis in axes if grid else ():
        axis.grid(axis=grid, alpha=0.3)
        axis.set_axisbelow(True)
    yield figure, axes
    figure.savefig(path, dpi=110)
