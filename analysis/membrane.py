"""How much of a network's accuracy hangs on the other samples of the batch: the membrane of the self-attention.

    python -m analysis.membrane --checkpoint output/released/best.pt output/first/best.pt

In the released code the last membrane of the self-attention runs over the samples of a batch as if they were time steps
(README, errata). Each checkpoint is evaluated with this membrane ("released") and with one for each sample
("per_sample"), at several batch sizes, in the order of the test set, sorted by class, and in random orders; and it is
counted how many answers change from one random order to the next. Checkpoints trained with the same membrane are
averaged. Writes membrane.csv, membrane.md and membrane.png.
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

from .common import Subject, checkpoint_parser, main, subjects, write_csv

MEMBRANES = ("released", "per_sample")


@torch.inference_mode()
def answers(model: nn.Module, images: Tensor, order: Tensor, batch_size: int) -> Tensor:
    """The class [N] that the model gives to each of `images` [N,...], met in `order` [N] in batches of `batch_size`."""
    found = torch.empty_like(order)
    for indices in order.split(batch_size):
        found[indices] = model(images[indices]).argmax(1)
    return found


def study(subject: Subject, batch_sizes: Sequence[int], shuffles: int) -> list[dict]:
    """A row for each membrane, batch size and kind of order: accuracy (%), and the answers (%) that change."""
    images, labels = subject.samples(10**9)
    generator = torch.Generator().manual_seed(0)
    random = [torch.randperm(len(labels), generator=generator).to(labels.device) for _ in range(shuffles)]
    orders = {"as it is": [torch.arange(len(labels), device=labels.device)], "by class": [labels.argsort(stable=True)]}
    orders["random"] = random
    rows = []
    for membrane in MEMBRANES:
        model = _model(subject, membrane)
        cases = [(size, order) for size in batch_sizes for order in orders]
        for size, order in progress(cases, f"{subject.path}, {membrane}", 6, show=True):
            found = [answers(model, images, indices, size) for indices in orders[order]]
            top1 = [100 * (answer == labels).double().mean().item() for answer in found]
            changed = [100 * (a != b).double().mean().item() for a, b in itertools.pairwise(found)]
            rows.append({
                "checkpoint": str(subject.path), "trained": subject.cfg.ssa_membrane, "evaluated": membrane,
                "batch size": size, "order": order, "top1": statistics.mean(top1), "lowest": min(top1),
                "highest": max(top1), "answers that change": statistics.mean(changed) if changed else None,
            })  # fmt: skip
    return rows


def _model(subject: Subject, membrane: str) -> nn.Module:
    cfg = dataclasses.replace(subject.cfg, ssa_membrane=membrane)
    model = build_model(cfg).to(subject.here.device).eval()
    load_weights(cfg, model, checkpoint.read(subject.path), subject.path)
    return model


def averages(rows: Sequence[dict]) -> list[dict]:
    """Over the checkpoints that were trained with the same membrane: mean and standard deviation."""
    keys = ("trained", "evaluated", "batch size", "order")
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, case, strict=True))
        | {
            "top1": statistics.mean(row["top1"] for row in group),
            "deviation": statistics.stdev(row["top1"] for row in group) if len(group) > 1 else 0.0,
            "lowest": min(row["lowest"] for row in group),
            "highest": max(row["highest"] for row in group),
            "answers that change": statistics.mean(row["answers that change"] or 0 for row in group),
            "checkpoints": len(group),
        }
        for case, group in groups.items()
    ]


def table(means: Sequence[dict]) -> str:
    """Accuracy in random order, by batch size, as Markdown."""
    sizes = sorted({row["batch size"] for row in means})
    lines = {}
    for row in means:
        if row["order"] == "as it is":
            continue
        line = lines.setdefault((row["trained"], row["evaluated"], row["order"]), {})
        changing = f", {row['answers that change']:.1f} change" if row["order"] == "random" else ""
        line[row["batch size"]] = f"{row['top1']:.2f} ± {row['deviation']:.2f}{changing}"
    rows = [[*case, *(line[size] for size in sizes)] for case, line in lines.items()]
    headers = ["trained", "evaluated", "order", *(f"batch {size}" for size in sizes)]
    return tabulate(rows, headers=headers, tablefmt="github")


def draw(means: Sequence[dict], path: Path) -> None:
    """Accuracy against the batch size for each way of training, and the answers that change."""
    ways = list(dict.fromkeys(row["trained"] for row in means))
    figure = Figure(figsize=(5.2 * (len(ways) + 1), 4.4), layout="constrained")
    axes = figure.subplots(1, len(ways) + 1)
    colours = {"released": "tab:red", "per_sample": "tab:blue"}
    styles = {"random": "o-", "as it is": "x:", "by class": "s--"}
    for axis, trained in zip(axes, ways, strict=False):
        for membrane in MEMBRANES:
            for order, style in styles.items():
                mine = [r for r in means if (r["trained"], r["evaluated"], r["order"]) == (trained, membrane, order)]
                sizes = [row["batch size"] for row in mine]
                axis.plot(
                    sizes, [r["top1"] for r in mine], style, color=colours[membrane], label=f"{membrane}, {order}"
                )
                if order == "random":
                    bounds = [[row[key] for row in mine] for key in ("lowest", "highest")]
                    axis.fill_between(sizes, *bounds, color=colours[membrane], alpha=0.15)
        axis.set(title=f"trained with {trained}", ylabel="top-1 (%)")
    lowest = min(row["lowest"] for row in means)
    for axis in axes[:-1]:
        axis.set_ylim(lowest - 1, 100.2)
    axes[0].legend(fontsize=8, title="evaluated with, order of samples", title_fontsize=8)
    for trained, style in zip(ways, ("o-", "s--"), strict=False):
        for membrane in MEMBRANES:
            mine = [r for r in means if (r["trained"], r["evaluated"], r["order"]) == (trained, membrane, "random")]
            values = [row["answers that change"] for row in mine]
            label = f"trained {trained}, evaluated {membrane}"
            axes[-1].plot([row["batch size"] for row in mine], values, style, color=colours[membrane], label=label)
    axes[-1].set(title="answers that change with the neighbours", ylabel="% of the samples, between two random orders")
    axes[-1].legend(fontsize=8)
    for axis in axes:
        axis.set(xlabel="batch size", xscale="log")
        axis.set_xticks(sizes, sizes)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def run(argv: Sequence[str]) -> None:
    flags = checkpoint_parser(__doc__)
    flags.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16, 64, 120], help="(1 4 16 64 120)")
    flags.add_argument("--shuffles", type=int, default=3, help="random orders of the test set (3)")
    args, rest = flags.parse_known_args(argv)
    if args.shuffles < 2 or min(args.batch_sizes) < 1:
        raise UserError("--shuffles must be at least 2, and --batch-sizes at least 1")
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
