"""Training curves of the published logs and of runs of one's own, in one picture.

    python -m analysis.curves                                            # all published logs
    python -m analysis.curves output/cifar10 --published cifar10

Draws the accuracy on the test set after each epoch, and the losses where they were recorded: solid while training,
dashed on the test set. A circle marks the best epoch. Runs are folders of train.py, with their metrics.jsonl.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes

from engine.cli import UserError
from engine.log import label, logger, read_record, setup_console

from .common import drawing, main, parser

LOGS = Path(__file__).with_name("logs")
TITLES = {  # of the published logs
    "imagenet_768_224": "ImageNet, 10-768 at 224",
    "imagenet_768_384": "ImageNet, fine-tuned at 384",
    "cifar10": "CIFAR-10, 4-384",
    "cifar100": "CIFAR-100, 4-384",
    "cifar10-dvs": "CIFAR10-DVS, 2-256",
}


class Curve(NamedTuple):
    """Figures of a training run, one for each epoch."""

    name: str
    epochs: list[int]  # from 1 on
    top1: list[float]  # percent, on the test set
    losses: dict[str, list[float]]  # of "train" and "test", where recorded


def published(name: str) -> Curve:
    """Return the curve of a log. That of CIFAR-100 misses two epochs, so later ones are drawn up to two early."""
    log = json.loads((LOGS / f"{name}.json").read_text())
    top1 = log["test_acc1"]
    epochs = [epoch + 1 for epoch in log.get("epochs", range(len(top1)))]
    losses = {kind: log[f"{kind}_loss"] for kind in ("train", "test") if f"{kind}_loss" in log}
    return Curve(f"{TITLES[name]} (log)", epochs, top1, losses)


def run_curve(folder: Path, name: str) -> Curve:
    """Return the curve of a run; raises `UserError` where it has none."""
    keys = ("epoch", "test_top1", "train_loss", "test_loss")

    def parse(text: str) -> list[list[float]]:
        rows = [json.loads(line) for line in text.splitlines()]
        return [[float(row[key]) for key in keys] for row in rows]

    if not (rows := read_record(folder / "metrics.jsonl", [], parse)):
        raise UserError(f"{folder}: no epoch in metrics.jsonl; name the folder of a run of train.py")
    epochs, top1, train, test = ([*column] for column in zip(*rows, strict=True))
    return Curve(label(name, 40), [int(epoch) + 1 for epoch in epochs], top1, {"train": train, "test": test})


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draw the accuracies, and next to them the losses if there are any."""
    with_losses = [curve for curve in curves if curve.losses]
    with drawing(path, 1, 2 if with_losses else 1, (13 if with_losses else 7.5, 4.8)) as (_, (accuracy, *others)):
        for i, curve in enumerate(curves):
            _draw_accuracy(accuracy, curve, f"C{i}")
            for axis in others:
                for (kind, values), style in zip(curve.losses.items(), ("-", "--"), strict=False):
                    axis.plot(curve.epochs, values, style, color=f"C{i}", label=f"{curve.name}, {kind}")
        accuracy.set(ylabel="top-1 on the test set (%)", title="accuracy; circles: best epoch")
        for axis in others:
            axis.set(ylabel="loss", title="loss")
        for axis in (accuracy, *others):
            axis.set(xlabel="epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=9)


def _draw_accuracy(axis: Axes, curve: Curve, colour: str) -> None:
    best = max(range(len(curve.top1)), key=curve.top1.__getitem__)
    name = f"{curve.name}: {curve.top1[best]:.2f} %, epoch {curve.epochs[best]}"
    axis.plot(curve.epochs, curve.top1, color=colour, label=name)
    axis.plot(curve.epochs[best], curve.top1[best], "o", color=colour, fillstyle="none")


def run(argv: Sequence[str]) -> None:
    flags = parser(__doc__)
    flags.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs")
    logs = {"nargs": "+", "choices": [*TITLES], "metavar": "LOG"}
    flags.add_argument("--published", **logs, help=f"{', '.join(TITLES)} (all; with runs none)")
    flags.add_argument("--output", type=Path, default=Path("output/curves.png"), help="picture (output/curves.png)")
    args = flags.parse_args(argv)
    setup_console(is_main=True)
    names = args.published or ([] if args.runs else [*TITLES])
    curves = [published(name) for name in names]
    runs = [run.resolve() for run in args.runs]
    parent = os.path.commonpath([run.parent for run in runs]) if runs else None
    curves += [run_curve(run, str(run.relative_to(parent))) for run in runs]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, args.output)
    logger.info(f"written: {args.output}")


if __name__ == "__main__":
    main(run)
