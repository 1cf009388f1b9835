"""Output of a run: lines and a progress bar, metrics, TensorBoard, learning curve, and provenance."""

import functools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .cli import UserError

logger = logging.getLogger("qkformer")
ROOT = Path(__file__).resolve().parents[1]
DRAWN = {"loss": ["train_loss", "test_loss"], "test accuracy (%)": ["test_top1"], "learning rate": ["lr"]}
PACKAGES = ("torch", "torchvision", "timm", "spikingjelly", "numpy")


def setup_console(is_main: bool) -> None:
    """Print the lines of `engine` and `models` on stdout, from the main rank only."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.raiseExceptions = False  # a run continues without a reader of its output
    for source in (logger, logging.getLogger("models")):
        source.handlers = [handler]
        source.propagate = False
        source.setLevel(logging.INFO if is_main else logging.ERROR)


def progress(
    loader: Iterable, what: str, interval: int, show: bool, status=dict, total: int | None = None, done: int = 0
) -> Iterator:
    """Yield from `loader` with a bar on a terminal, else with a plain line every `interval` steps.

    Args:
        status: returns the values to show; called only when they are shown.
        total: steps, if `loader` has no length.
        done: steps before the first of `loader`.
    """
    total = len(loader) if total is None else total
    bar = tqdm(loader, desc=what, total=total, initial=done, leave=False, disable=not show or not sys.stderr.isatty())
    start = time.monotonic()
    for step, batch in enumerate(bar, done + 1):
        yield batch
        if show and step % interval == 0:
            if not bar.disable:
                bar.set_postfix(status())
            elif step < total:
                left = (time.monotonic() - start) / (step - done) * (total - step)
                values = "".join(f", {key} {value}" for key, value in status().items())
                logger.info(f"{what}: step {step}/{total}{values}, {left:.0f} s left")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a crash leaves the old file or the new one."""
    temporary = Path(f"{path}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_record(path: Path, default: object, parse: Callable[[str], object]) -> object:
    """Return `parse` of a record's text, or `default` if there is none; raise `UserError` if it is damaged."""
    try:
        return parse(path.read_text()) if path.exists() else default
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{path}: damaged; move it away to continue without this record") from None


def _rows(first_epoch: int, text: str) -> list[dict]:
    """Return the metrics of the epochs before `first_epoch`."""
    lines = text.splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a crash may leave half a line
    rows = [row for row in rows if row["epoch"] < first_epoch]
    if not all(isinstance(row[key], int | float) for row in rows for keys in DRAWN.values() for key in keys):
        raise ValueError
    return rows


class RunLog:
    """The records of one training run in `folder`: `metrics.jsonl`, TensorBoard's events, `learning_curve.png`."""

    def __init__(self, folder: Path, first_epoch: int):
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.history = read_record(self.path, [], functools.partial(_rows, first_epoch))
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.history))
        self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=first_epoch)

    def epoch(self, row: dict) -> None:
        """Record the figures of one epoch."""
        self.history.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key != "epoch":
                self.tensorboard.add_scalar(key, value, row["epoch"])
        self.tensorboard.flush()

    def close(self) -> None:
        """Draw the learning curve and close the files."""
        self.tensorboard.close()
        if self.history:
            learning_curve(self.history, self.folder / "learning_curve.png")


def learning_curve(history: list[dict], path: Path) -> None:
    """Draw losses, accuracy and learning rate over the epochs."""
    epochs = [row["epoch"] + 1 for row in history]
    best = max(history, key=lambda row: row["test_top1"])
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axis, (name, keys) in zip(figure.subplots(1, 3), DRAWN.items(), strict=True):
        for key in keys:
            axis.plot(epochs, [row[key] for row in history], marker=".", label=key)
        axis.set(xlabel="epoch", ylabel=name)
        axis.legend()
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.suptitle(f"best top-1: {best['test_top1']:.2f} % (epoch {best['epoch'] + 1})")
    figure.savefig(path, dpi=110)


def label(name: str, most: int = 15) -> str:
    """Return a name for a picture, cut to `most` characters, with no formula in it."""
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return name.replace("$", r"\$")


def provenance() -> dict:
    """Return git commit, versions of packages, command line and time."""
    return {
        "git_commit": _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {d.name: d.version for d in distributions() if d.name in PACKAGES},
    }


def _git(*arguments: str) -> str:
    """Return git's output in this repository; nothing without git or a repository."""
    try:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
