"""How much of a network's accuracy hangs on the other samples of the batch: the membrane of the self-attention.

    python -m analysis.membrane --checkpoint output/released/best.pt output/first/best.pt

In the released code the last membrane of the self-attention runs over the samples of a batch as if they were time steps
(README, errata). Each checkpoint is evaluated with this membrane ("released") and with one for each sample
("per_sample"), at several batch sizes, in the order of the test set, sorted by class, and in random orders. From one
random order to the next it is counted how many answers change, and how much of the probability moves from class to
class (total variation of the softmax). Checkpoints that were trained alike, from several seeds, are averaged. Writes
membrane.csv, membrane.md and membrane.png.
"""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn

from engine.cli import UserError
from engine.config import MODEL_FIELDS, plain
from engine.log import logger, progress
from engine.run import build_model

from .common import Subject, checkpoint_parser, main, positive, subjects, write_csv

MEMBRANES = ("released", "per_sample")
# what checkpoints that are averaged have in common, besides their training
SAME = [key for key in (*MODEL_FIELDS, "dataset", "input_size") if key != "ssa_membrane"]
CHANGES = ("answers that change", "probability that moves")


@torch.inference_mode()
def probabilities(model: nn.Module, images: Tensor, order: Tensor, batch_size: int) -> Tensor:
    """Softmax [N,classes] of each of `images` [N,...], met in `order` [N] in batches of `batch_size`."""
    found = [model(images[indices]).double().softmax(1) for indices in order.split(batch_size)]
    return torch.cat(found)[order.argsort()]


def study(subject: Subject, samples: int, batch_sizes: Sequence[int], shuffles: int) -> list[dict]:
    """A row for each membrane, batch size and kind of order, in percent: accuracy, and what changes between orders."""
    images, labels = subject.samples(samples, spread=True)
    generator = torch.Generator().manual_seed(0)
    random = [torch.randperm(len(labels), generator=generator).to(labels.device) for _ in range(shuffles)]
    as_it_is, by_class = torch.arange(len(labels), device=labels.device), labels.argsort(stable=True)
    orders = {"as it is": [as_it_is], "by class": [by_class], "random": random}
    rows, settings = [], plain(subject.cfg)
    for membrane in MEMBRANES:
        model = _model(subject, membrane)
        cases = [(size, order) for size in batch_sizes for order in orders]
        for size, order in progress(cases, f"{subject.path}, {membrane}", 5, show=True):
            found = [probabilities(model, images, indices, size) for indices in orders[order]]
            row = {
                "checkpoint": str(subject.path),
                "network": f"{subject.cfg.model}, {' '.join(subject.model.attention)}",
                "settings": json.dumps({key: settings[key] for key in SAME}),
                "trained": subject.cfg.ssa_membrane,
                "evaluated": membrane,
                "batch size": size,
                "order": order,
            }
            rows.append(row | _figures(found, labels))
    return rows


def _figures(found: Sequence[Tensor], labels: Tensor) -> dict[str, float]:
    """Of the probabilities [N,classes] in one order or several."""
    top1 = [100 * (values.argmax(1) == labels).double().mean().item() for values in found]
    pairs = list(itertools.pairwise(found))
    answers = [100 * (a.argmax(1) != b.argmax(1)).double().mean().item() for a, b in pairs]
    moved = [100 * (a - b).abs().sum(1).mean().item() / 2 for a, b in pairs]
    return {
        "top1": statistics.mean(top1),
        "answers that change": statistics.mean(answers or [0.0]),
        "probability that moves": statistics.mean(moved or [0.0]),
    }


def _model(subject: Subject, membrane: str) -> nn.Module:
    model = build_model(dataclasses.replace(subject.cfg, ssa_membrane=membrane)).to(subject.here.device).eval()
    model.load_state_dict(subject.model.state_dict())
    return model


def averages(rows: Sequence[dict]) -> list[dict]:
    """A row for each way of training and each batch size: the leaking membrane against the other, over checkpoints.

    `difference` is that of the accuracy in random order, `deviation` its standard deviation over the checkpoints.
    """
    keys = ("checkpoint", "evaluated", "batch size", "order")
    found = {tuple(row[key] for key in keys): row for row in rows}
    groups = {}
    for (path, membrane, size, order), row in found.items():
        if (membrane, order) == ("released", "random"):
            others = [found[path, *case] for case in (("per_sample", size, order), ("released", size, "by class"))]
            case = (row["network"], row["settings"], row["trained"], size)
            groups.setdefault(case, []).append((row, *others))
    return [
        {
            "network": network,
            "settings": settings,
            "trained": trained,
            "batch size": size,
            "checkpoints": len(group),
            "per_sample": statistics.mean(other["top1"] for _, other, _ in group),
            "released": statistics.mean(row["top1"] for row, _, _ in group),
            "released, by class": statistics.mean(by_class["top1"] for _, _, by_class in group),
            "difference": statistics.mean(row["top1"] - other["top1"] for row, other, _ in group),
            "deviation": _deviation([row["top1"] - other["top1"] for row, other, _ in group]),
            **{key: statistics.mean(row[key] for row, _, _ in group) for key in CHANGES},
        }
        for (network, settings, trained, size), group in groups.items()
    ]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(means: Sequence[dict]) -> str:
    """The averages as Markdown; all figures in percent."""
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
    """What the neighbours change, against the batch size: a line for each way of training."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    axes = figure.subplots(1, 3)
    sizes = sorted({row["batch size"] for row in means})
    ways = list(dict.fromkeys((row["network"], row["settings"], row["trained"]) for row in means))
    colours = dict(zip(dict.fromkeys(way[:2] for way in ways), itertools.cycle(TABLEAU_COLORS)))
    for way in ways:
        mine = [row for row in means if (row["network"], row["settings"], row["trained"]) == way]
        network, settings, trained = way
        look = {"color": colours[network, settings], "linestyle": "-" if trained == "released" else "--", "marker": "o"}
        label = f"{network}, trained with {trained}"
        values, spread = ([row[key] for row in mine] for key in ("difference", "deviation"))
        axes[0].errorbar(sizes, values, spread, capsize=3, label=label, **look)
        for axis, key in zip(axes[1:], CHANGES, strict=True):
            axis.plot(sizes, [row[key] for row in mine], **look)
    axes[0].axhline(0, color="grey", linewidth=0.8)
    axes[0].set(title="accuracy: released - per_sample", ylabel="percent of the samples")
    axes[1].set(title="answers that change from order to order", ylabel="percent of the samples")
    axes[2].set(title="probability that moves from order to order", ylabel="percent")
    for axis in axes:
        axis.set(xlabel="batch size of the evaluation", xscale="log")
        axis.set_xticks(sizes, sizes)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


def run(argv: Sequence[str]) -> None:
    flags = checkpoint_parser(__doc__)
    flags.add_argument("--batch-sizes", nargs="+", type=positive, default=[1, 4, 16, 64, 120], help="(1 4 16 64 120)")
    flags.add_argument("--shuffles", type=positive, default=3, help="random orders of the test set (3)")
    flags.add_argument(
        "--samples", type=positive, default=2000, help="at most so many test samples, from all over the set (2000)"
    )
    args, rest = flags.parse_known_args(argv)
    if args.shuffles < 2:
        raise UserError("--shuffles 1: what changes needs two orders at least")
    rows = []
    for subject in subjects(args, rest):
        if subject.cfg.residual == "ms" or "self" not in subject.model.attention:
            raise UserError(f"{subject.path}: nothing in this network can leak over the batch")
        rows += study(subject, args.samples, sorted(set(args.batch_sizes)), args.shuffles)
    means = averages(rows)
    csv, markdown, picture = (args.output_dir / f"membrane.{kind}" for kind in ("csv", "md", "png"))
    write_csv(csv, rows)
    markdown.write_text(table(means) + "\n")
    draw(means, picture)
    most = max(row[CHANGES[0]] for row in rows if row["evaluated"] == "per_sample")
    logger.info(f"{table(means)}\nevaluated with per_sample, {most:.2f} % of the answers change at most")
    logger.info(f"written: {csv}, {markdown}, {picture}")


if __name__ == "__main__":
    main(run)
