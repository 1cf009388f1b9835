"""How much of a network's accuracy hangs on the other samples of the batch: the membrane of the self-attention.

    python -m analysis.membrane --checkpoint output/released/best.pt output/first/best.pt

In the released code the last membrane of the self-attention runs over the samples of a batch as if they were time steps
(README, errata). Each checkpoint is evaluated with this membrane ("released") and with one for each sample
("per_sample"), at several batch sizes, in the order of the test set, sorted by class, and in random orders. From one
random order to the next it is counted how many answers change, and how much of the probability moves from class to
class (total variation of the softmax). Checkpoints that differ by their seed are averaged. Writes membrane.csv,
membrane.md and membrane.png.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn

from engine import checkpoint
from engine.errors import UserError
from engine.log import logger, progress
from engine.run import build_model, load_weights

from .common import Subject, checkpoint_parser, main, positive, subjects, write_csv

MEMBRANES = {"released": "tab:red", "per_sample": "tab:blue"}
CHANGES = ("answers that change", "probability that moves")


@torch.inference_mode()
def probabilities(model: nn.Module, images: Tensor, order: Tensor, batch_size: int) -> Tensor:
    """Softmax [N,classes] of each of `images` [N,...], met in `order` [N] in batches of `batch_size`."""
    found = [model(images[indices]).double().softmax(1) for indices in order.split(batch_size)]
    return torch.cat(found)[order.argsort()]


def study(subject: Subject, batch_sizes: Sequence[int], shuffles: int) -> list[dict]:
    """A row for each membrane, batch size and kind of order, in percent: accuracy, and what changes between orders."""
    images, labels = subject.samples(10**9)
    generator = torch.Generator().manual_seed(0)
    random = [torch.randperm(len(labels), generator=generator).to(labels.device) for _ in range(shuffles)]
    as_it_is, by_class = torch.arange(len(labels), device=labels.device), labels.argsort(stable=True)
    orders = {"as it is": [as_it_is], "by class": [by_class], "random": random}
    rows = []
    for membrane in MEMBRANES:
        model = _model(subject, membrane)
        cases = [(size, order) for size in batch_sizes for order in orders]
        for size, order in progress(cases, f"{subject.path}, {membrane}", 5, show=True):
            found = [probabilities(model, images, indices, size) for indices in orders[order]]
            row = {
                "checkpoint": str(subject.path),
                "attention": " ".join(subject.model.attention),
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
        "lowest": min(top1),
        "highest": max(top1),
        "answers that change": statistics.mean(answers or [0.0]),
        "probability that moves": statistics.mean(moved or [0.0]),
    }


def _model(subject: Subject, membrane: str) -> nn.Module:
    cfg = dataclasses.replace(subject.cfg, ssa_membrane=membrane)
    model = build_model(cfg).to(subject.here.device).eval()
    load_weights(cfg, model, checkpoint.read(subject.path), subject.path)
    return model


def averages(rows: Sequence[dict]) -> list[dict]:
    """Over the checkpoints that were trained in the same way: means, and the standard deviation of the accuracy."""
    keys = ("attention", "trained", "evaluated", "batch size", "order")
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, case, strict=True))
        | {
            "checkpoints": len(group),
            "top1": statistics.mean(row["top1"] for row in group),
            "deviation": statistics.stdev(row["top1"] for row in group) if len(group) > 1 else 0.0,
            "lowest": min(row["lowest"] for row in group),
            "highest": max(row["highest"] for row in group),
            **{key: statistics.mean(row[key] for row in group) for key in CHANGES},
        }
        for case, group in groups.items()
    ]


def table(means: Sequence[dict]) -> str:
    """What depends on the neighbours, as Markdown: a line for each way of training, membrane and batch size."""
    rows = []
    for row in means:
        if row["order"] == "random":
            case = {key: row[key] for key in ("attention", "trained", "evaluated", "batch size")}
            sorted_ = next(r for r in means if r["order"] == "by class" and case.items() <= r.items())
            texts = [f"{r['top1']:.2f} ± {r['deviation']:.2f}" for r in (row, sorted_)]
            rows.append([*case.values(), *texts, *(f"{row[key]:.2f}" for key in CHANGES)])
    headers = ["attention", "trained", "evaluated", "batch size", "top-1 (%), random order", "sorted by class"]
    return tabulate(rows, headers=[*headers, *(f"{key} (%)" for key in CHANGES)], tablefmt="github")


def draw(means: Sequence[dict], path: Path) -> None:
    """Accuracy against the batch size for each way of training; then what changes with the neighbours."""
    ways = list(dict.fromkeys((row["attention"], row["trained"]) for row in means))
    sizes = sorted({row["batch size"] for row in means})
    figure = Figure(figsize=(4.2 * (len(ways) + 1), 4.4), layout="constrained")
    axes = figure.subplots(1, len(ways) + 1)

    def series(way: tuple, membrane: str, order: str, key: str) -> list[float]:
        case = (*way, membrane, order)
        names = ("attention", "trained", "evaluated", "order")
        return [row[key] for row in means if tuple(row[name] for name in names) == case]

    for axis, way in zip(axes, ways, strict=False):
        for membrane, colour in MEMBRANES.items():
            for order, style in {"random": "o-", "as it is": "x:", "by class": "s--"}.items():
                axis.plot(
                    sizes, series(way, membrane, order, "top1"), style, color=colour, label=f"{membrane}, {order}"
                )
            bounds = (series(way, membrane, "random", key) for key in ("lowest", "highest"))
            axis.fill_between(sizes, *bounds, color=colour, alpha=0.12)
        axis.set(title=f"{way[0]}\ntrained with {way[1]}", ylabel="top-1 (%)")
        axis.set_ylim(min(row["lowest"] for row in means) - 0.2, max(row["highest"] for row in means) + 0.2)
    axes[0].legend(fontsize=8, title="evaluated with, order of the samples", title_fontsize=8)
    for way, style in zip(ways, itertools.cycle(("o-", "s--", "^-.", "v:"))):
        for membrane, colour in MEMBRANES.items():
            label = f"{' '.join(way)} → {membrane}"
            axes[-1].plot(sizes, series(way, membrane, "random", CHANGES[1]), style, color=colour, label=label)
    axes[-1].set(title="between two random orders", ylabel="probability that moves (%)")
    axes[-1].legend(fontsize=7, title="attention, trained → evaluated with", title_fontsize=7)
    for axis in axes:
        axis.set(xlabel="batch size", xscale="log")
        axis.set_xticks(sizes, sizes)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def run(argv: Sequence[str]) -> None:
    flags = checkpoint_parser(__doc__)
    flags.add_argument("--batch-sizes", nargs="+", type=positive, default=[1, 4, 16, 64, 120], help="(1 4 16 64 120)")
    flags.add_argument("--shuffles", type=positive, default=3, help="random orders of the test set (3)")
    args, rest = flags.parse_known_args(argv)
    if args.shuffles < 2:
        raise UserError("--shuffles 1: what changes needs two orders at least")
    rows = []
    for subject in subjects(args, rest):
        if subject.cfg.residual == "ms" or "self" not in subject.model.attention:
            raise UserError(f"{subject.path}: nothing in this network can leak over the batch")
        rows += study(subject, sorted(set(args.batch_sizes)), args.shuffles)
    means = averages(rows)
    csv, markdown, picture = (args.output_dir / f"membrane.{kind}" for kind in ("csv", "md", "png"))
    write_csv(csv, rows)
    markdown.write_text(table(means) + "\n")
    draw(means, picture)
    logger.info(f"{table(means)}\nwritten: {csv}, {markdown}, {picture}")


if __name__ == "__main__":
    main(run)
