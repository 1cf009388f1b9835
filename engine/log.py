"""What a run leaves behind: lines and a progress bar, JSON lines, TensorBoard, and pictures."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .errors import UserError

logger = logging.getLogger("qkformer")
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "timm", "spikingjelly", "numpy")


def setup_console(is_main: bool) -> None:
    """Lines on standard output, from the main process only."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main else logging.ERROR)


def progress(loader: Iterable, what: str, interval: int, show: bool, status=dict) -> Iterator:
    """Yield from `loader` with a bar on a terminal, else with a plain line every `interval` steps.

    `status()` gives the values to show; it is called only when they are shown.
    """
    bar = tqdm(loader, desc=what, leave=False, disable=not show or not sys.stderr.isatty())
    start = time.monotonic()
    for step, batch in enumerate(bar, 1):
        yield batch
        if show and step % interval == 0:
            if not bar.disable:
                bar.set_postfix(status())
            elif step < len(loader):
                left = (time.monotonic() - start) / step * (len(loader) - step)
                values = "".join(f", {key} {value}" for key, value in status().items())
                logger.info(f"{what}: step {step}/{len(loader)}{values}, {left:.0f} s left")


class RunLog:
    """The records of one training run in `folder`: `metrics.jsonl`, TensorBoard's events, `learning_curve.png`."""

    def __init__(self, folder: Path, first_epoch: int):
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.history = [row for row in self._read() if row["epoch"] < first_epoch]
        temporary = folder / "metrics.jsonl.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.history))
        temporary.replace(self.path)
        self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=first_epoch)

    def _read(self) -> list[dict]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]  # a crash may leave half a line
        except ValueError:
            raise UserError(f"{self.path}: damaged; move it away to go on without the history") from None

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
    """Losses, accuracy and learning rate against the epoch."""
    epochs = [row["epoch"] + 1 for row in history]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].plot(epochs, [row["train_loss"] for row in history], marker=".", label="training")
    axes[0].plot(epochs, [row["test_loss"] for row in history], marker=".", label="test")
    axes[0].set(ylabel="loss", ylim=(0, None))
    axes[0].legend()
    top1 = [row["test_top1"] for row in history]
    best = max(range(len(top1)), key=top1.__getitem__)
    axes[1].plot(epochs, top1, marker=".", color="tab:orange")
    label = f"best: {top1[best]:.2f} % (epoch {epochs[best]})"
    axes[1].plot(epochs[best], top1[best], "o", color="tab:red", label=label)
    axes[1].set(ylabel="test top-1 accuracy (%)")
    axes[1].legend(loc="lower right")
    axes[2].plot(epochs, [row["lr"] for row in history], marker=".", color="tab:green")
    axes[2].set(ylabel="learning rate", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


class Gallery:
    """Test images with the model's answers: the first mistakes, then right answers, `rows` x `columns` in all."""

    rows, columns = 4, 10

    def __init__(self, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]):
        self.classes, self.mean, self.std = classes, mean, std
        self.wrong, self.right = [], []

    def add(self, images: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor) -> None:
        """Take what is still needed of a batch: images [B,C,H,W] as the network sees them, logits [B,classes]."""
        size = self.rows * self.columns
        answers = logits.argmax(1)
        for kept, chosen, limit in ((self.wrong, answers != labels, size // 2), (self.right, answers == labels, size)):
            for i in chosen.nonzero()[: limit - len(kept), 0].tolist():
                kept.append((images[i].float().cpu(), labels[i].item(), answers[i].item()))

    def draw(self, path: Path) -> None:
        """Write the picture; mistakes come first, in red, with the truth."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        figure = Figure(figsize=(11, 1.5 * self.rows), layout="constrained")
        axes = figure.subplots(self.rows, self.columns)
        for axis in axes.flat:
            axis.axis("off")
        for axis, (image, label, answer) in zip(axes.flat, self.wrong + self.right, strict=False):
            axis.imshow((image * std + mean).permute(1, 2, 0).clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            said, true = (_short(self.classes[index]) for index in (answer, label))
            if label == answer:
                axis.set_title(said, fontsize=8)
            else:
                axis.set_title(f"{said}\nis {true}", fontsize=8, color="tab:red")
        figure.suptitle("Test images with the model's answers; mistakes first, in red", fontsize=11)
        figure.savefig(path, dpi=110)


def _short(name: str, most: int = 15) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def provenance() -> dict:
    """What produced a result: git commit, versions of the packages, command line, time."""
    return {
        "git_commit": _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {d.name: d.version for d in distributions() if d.name in PACKAGES},
    }


def _git(*arguments: str) -> str:
    """What git prints in this repository; nothing where there is no git, or no repository."""
    try:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
