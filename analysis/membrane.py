"""Effect of the other samples in a batch on the answers, through the membrane of the self-attention (docs/errata.md).

    python -m analysis.membrane --checkpoint output/released/best.pt output/first/best.pt

Evaluates each checkpoint with both kinds of `ssa_membrane` at several batch sizes. The test set is in its own order,
sorted by class, and in random orders. Between random orders it counts answers that change, and probability that moves
(total variation of the softmax). Averages checkpoints that differ only in seed. Writes membrane.csv, .md and .png.
"""

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.colors import TABLEAU_COLORS
from tabulate import tabulate
from torch import Tensor, nn

from engine.cli import UserError
from engine.config import plain
from engine.log import logger, progress

from .common import Subject, drawing, main, positive, subjects, write_csv
from .results import SETTINGS

MEMBRANES = ("released", "per_sample")
SAME = [key for key in SETTINGS if key != "ssa_membrane"]  # settings that averaged checkpoints share
CHANGES = ("answers that change", "probability that moves")


@torch.inference_mode()
def probabilities(model: nn.Module, images: Tensor, order: Tensor, batch_size: int) -> Tensor:
    """Return the softmax [N,classes] of `images` [N,...], evaluated in `order` [N] in batches of `batch_size`."""
    outputs = [model(images[indices]).double().softmax(1) for indices in order.split(batch_size)]
    return torch.cat(outputs)[order.argsort()]


def study(subject: Subject, samples: int, batch_sizes: Sequence[int], shuffles: int) -> list[dict]:
    """Return a row for each membrane, batch size and kind of order, in percent: accuracy and changes between orders."""
    images, labels = subject.samples(samples, spread=True)
    generator = torch.Generator().manual_seed(0)
    random = [torch.randperm(len(labels), generator=generator).to(labels.device) for _ in range(shuffles)]
    as_it_is, by_class = torch.arange(len(labels), device=labels.device), labels.argsort(stable=True)
    orders = {"as it is": [as_it_is], "by class": [by_class], "random": random}
    rows, settings = [], plain(subject.cfg)
    for membrane in MEMBRANES:
        model = subject.rebuilt(ssa_membrane=membrane)
        cases = [(size, order) for size in batch_sizes for order in orders]
        for size, order in progress(cases, f"{subject.path}, {membrane}", 5, show=True):
            outputs = [probabilities(model, images, indices, size) for indices in orders[order]]
            row = {
                "checkpoint": str(subject.path),
                "network": f"{subject.cfg.model}, {' '.join(subject.model.attention)}",
                "settings": json.dumps({key: settings[key] for key in SAME}),
                "trained": subject.cfg.ssa_membrane,
                "evaluated": membrane,
                "batch size": size,
                "order": order,
            }
            rows.append(row | _figures(outputs, labels))
    return rows


def _figures(outputs: Sequence[Tensor], labels: Tensor) -> dict[str, float]:
    """Compare the probabilities [N,classes] of each order with the next."""
    top1 = [100 * (values.argmax(1) == labels).double().mean().item() for values in outputs]
    pairs = list(itertools.pairwise(outputs))
    answers = [100 * (a.argmax(1) != b.argmax(1)).double().mean().item() for a, b in pairs]
    moved = [100 * (a - b).abs().sum(1).mean().item() / 2 for a, b in pairs]
    figures = [statistics.mean(values or [0.0]) for values in (top1, answers, moved)]
    return dict(zip(("top1", *CHANGES), figures, strict=True))


def averages(rows: Sequence[dict]) -> list[dict]:
    """Return means over checkpoints for each kind of training and batch size; `difference` is for random orders."""
    groups, mean = {}, statistics.mean
    for row in rows:
        case = {key: row[key] for key in ("network", "settings", "trained", "batch size")}
        groups.setdefault(tuple(case.items()), {}).setdefault((row["evaluated"], row["order"]), []).append(row)
    means = []
    for case, group in groups.items():
        leaking, alone = group["released", "random"], group["per_sample", "random"]
        differences = [row["top1"] - other["top1"] for row, other in zip(leaking, alone, strict=True)]
        means.append(
            dict(case)
            | {"per_sample": mean(row["top1"] for row in alone), "released": mean(row["top1"] for row in leaking)}
            | {"released, by class": mean(row["top1"] for row in group["released", "by class"])}
            | {"difference": mean(differences), "checkpoints": len(differences)}
            | {"deviation": statistics.stdev(differences) if len(differences) > 1 else 0.0}
            | {key: mean(row[key] for row in leaking) for key in CHANGES}
        )
    return means


def table(means: Sequence[dict]) -> str:
    """Format the averages as Markdown, in percent."""
    rows = [
        {
            **{key: row[key] for key in ("network", "trained", "batch size")},
            **{f"top-1 {key}": f"{row[key]:.2f}" for key in ("per_sample", "released", "released, by class")},
            "released - per_sample": f"{row['difference']:+.2f} ± {row['deviation']:.2f}",
            **{key: f"{row[key]:.2f}" for key in CHANGES},
        }
        for row in means
    ]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def draw(means: Sequence[dict], path: Path) -> None:
    """Draw the effect of the neighbours against the batch size, a line for each way of training."""
    sizes = sorted({row["batch size"] for row in means})
    ways = list(dict.fromkeys((row["network"], row["settings"], row["trained"]) for row in means))
    colours = dict(zip(dict.fromkeys(way[:2] for way in ways), itertools.cycle(TABLEAU_COLORS)))
    with drawing(path, 1, 3, (14, 4.4), grid="both") as (figure, axes):
        for way in ways:
            points = [row for row in means if (row["network"], row["settings"], row["trained"]) == way]
            network, settings, trained = way
            look = {"color": colours[network, settings], "ls": "-" if trained == "released" else "--", "marker": "o"}
            values, spread = ([row[key] for row in points] for key in ("difference", "deviation"))
            axes[0].errorbar(sizes, values, spread, capsize=3, label=f"{network}, trained with {trained}", **look)
            for axis, key in zip(axes[1:], CHANGES, strict=True):
                axis.plot(sizes, [row[key] for row in points], **look)
        axes[0].axhline(0, color="grey", linewidth=0.8)
        axes[0].set(title="accuracy: released - per_sample", ylabel="percent of the samples")
        axes[1].set(title="answers that change between orders", ylabel="percent of the samples")
        axes[2].set(title="probability that moves between orders", ylabel="percent")
        for axis in axes:
            axis.set(xlabel="batch size of the evaluation", xscale="log")
            axis.set_xticks(sizes, sizes)
            axis.minorticks_off()
        figure.legend(loc="outside lower center", ncols=2)


def run(argv: Sequence[str]) -> None:
    args, loaded = subjects(
        __doc__,
        argv,
        batch_sizes={"nargs": "+", "type": positive, "default": [1, 4, 16, 64, 120], "help": "(1 4 16 64 120)"},
        shuffles={"type": positive, "default": 3, "help": "random orders of the test set (3)"},
        samples={"type": positive, "default": 2000, "help": "largest number of test samples, evenly spaced (2000)"},
    )
    if args.shuffles < 2:
        raise UserError("--shuffles 1: no second order to compare; use 2 or more")
    rows = []
    for subject in loaded:
        has_leak = hasattr(subject.model, "ssa_membrane") and "self" in subject.model.attention
        if subject.model.residual == "ms" or not has_leak:
            raise UserError(f"{subject.path}: no membrane leaks across the batch; use another checkpoint")
    for subject in loaded:
        rows += study(subject, args.samples, sorted(set(args.batch_sizes)), args.shuffles)
    means = averages(rows)
    write_csv(args.output_dir / "membrane.csv", rows)
    (args.output_dir / "membrane.md").write_text(table(means) + "\n")
    draw(means, args.output_dir / "membrane.png")
    most = max(row[CHANGES[0]] for row in rows if row["evaluated"] == "per_sample")
    logger.info(f"{table(means)}\nevaluated with per_sample, {most:.2f} % of the answers change at most")
    logger.info(f"written: membrane.csv, membrane.md and membrane.png in {args.output_dir}")


if __name__ == "__main__":
    main(run)
