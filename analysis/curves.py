"""Training curves of the published logs and of your own runs (folders of train.py), in one picture.

    python -m analysis.curves                                            # all published logs
    python -m analysis.curves output/cifar10 --published cifar10

Draws accuracy and losses by epoch. Losses are solid for training and dashed for the test set; circles mark the best
epochs.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine.cli import UserError
from engine.data.pictures import require_format
from engine.log import label, logger, read_record, setup_console

from .common import drawing, main, parser

LOGS = {path.stem: path for path in sorted(Path(__file__).with_name("logs").glob("*.json"))}


class Curve(NamedTuple):
    """Figures of a training run, one for each epoch."""

    name: str
    epochs: list[int]  # from 1 on
    top1: list[float]  # percent, on the test set
    losses: dict[str, list[float]]  # of "train" and "test", where recorded


def published(name: str) -> Curve:
    """Return the curve of a published log. CIFAR-100's lacks two epochs, so later ones appear up to two early."""
    log = json.loads(LOGS[name].read_text())
    epochs = [epoch + 1 for epoch in log.get("epochs", range(len(log["test_acc1"])))]
    losses = {kind: log[f"{kind}_loss"] for kind in ("train", "test") if f"{kind}_loss" in log}
    return Curve(f"{log['title']} (log)", epochs, log["test_acc1"], losses)


def run_curve(folder: Path, name: str) -> Curve:
    """Return the curve of a run; raise `UserError` if it has none."""
    keys = ("epoch", "test_top1", "train_loss", "test_loss")
    parse = lambda text: [[float(row[key]) for key in keys] for row in map(json.loads, text.splitlines())]  # noqa: E731
    if not (rows := read_record(folder / "metrics.jsonl", [], parse)):
        raise UserError(f"{folder}: no epoch in metrics.jsonl; pass the folder of a run of train.py")
    epochs, top1, train, test = ([*column] for column in zip(*rows, strict=True))
    return Curve(label(name, 40), [int(epoch) + 1 for epoch in epochs], top1, {"train": train, "test": test})


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draw the accuracies, and next to them the losses if there are any."""
    panels = 2 if any(curve.losses for curve in curves) else 1
    with drawing(path, 1, panels, (0.5 + 6.5 * panels, 4.8), grid="both") as (_, axes):
        for i, (name, epochs, top1, losses) in enumerate(curves):
            best = max(range(len(top1)), key=top1.__getitem__)
            about = f"{name}: {top1[best]:.2f} %, epoch {epochs[best]}"
            axes[0].plot(epochs, top1, color=f"C{i}", label=about)
            axes[0].plot(epochs[best], top1[best], "o", color=f"C{i}", fillstyle="none")
            for (kind, values), style in zip(losses.items(), ("-", "--"), strict=False):
                axes[1].plot(epochs, values, style, color=f"C{i}", label=f"{name}, {kind}")
        texts = ("accuracy on the test set; circles: best epoch", "top-1 (%)"), ("loss", "loss")
        for axis, (title, unit) in zip(axes, texts, strict=False):
            axis.set(title=title, ylabel=unit, xlabel="epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend(fontsize=9)


def run(argv: Sequence[str]) -> None:
    flags = parser(__doc__)
    flags.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs")
    flags.add_argument("--published", nargs="+", choices=LOGS, help="published logs to draw (all, or none with runs)")
    flags.add_argument("--output", type=Path, default=Path("output/curves.png"), help="picture (output/curves.png)")
    args = flags.parse_args(argv)
    setup_console(is_main=True)
    require_format("--output", args.output)
    names = args.published or ([] if args.runs else [*LOGS])
    curves = [published(name) for name in names]
    runs = [run.resolve() for run in args.runs]
    parent = os.path.commonpath([run.parent for run in runs]) if runs else None
    curves += [run_curve(run, str(run.relative_to(parent))) for run in runs]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, args.output)
    logger.info(f"written: {args.output}")


if __name__ == "__main__":
    main(run)
