"""Firing rate of each neuron layer of a trained network, and the integers after its SEW residuals.

    python -m analysis.firing_rates --checkpoint output/first/best.pt [--table]

A firing rate is the mean output of a LIF over the test set at each time step. Writes firing_rates.csv and .png, and
integers.csv for SEW residuals. `--table` adds firing_rates_table.csv, the paper's table of means over a stage's blocks.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import colormaps
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from engine.log import logger
from models import LIF
from models.attention import ChannelQKAttention, TokenQKAttention
from models.layers import SpikingMLP
from models.qkformer import Block

from .common import Subject, drawing, main, published, subjects, write_csv


class Rates(NamedTuple):
    """Figures of each layer, by the module's name and in the order of execution."""

    spikes: dict[str, Tensor]  # firing rate [T] of each LIF
    integers: dict[str, Tensor]  # share of each integer from 0 on, after each residual; none with membrane shortcuts
    masked: dict[str, Tensor]  # rate [T] of the keys that pass a Q-K attention, by the name of its `proj`


def measure(subject: Subject) -> Rates:
    """Average spikes and integers over the test set."""
    spikes, masked, counts, callbacks = {}, {}, {}, {}

    def add(rates: dict, name: str, values: Tensor) -> None:
        rates.setdefault(name, []).append(values.flatten(1).double().mean(1) * values.shape[1])  # [T]

    def add_integers(name: str, values: Tensor) -> None:
        counts.setdefault(name, []).append(torch.bincount(values.flatten().long()))

    for name, module in subject.model.named_modules():
        if isinstance(module, LIF):
            callbacks[module] = lambda _, output, name=name: add(spikes, name, output)
        elif isinstance(module, TokenQKAttention | ChannelQKAttention):
            callbacks[module.proj] = lambda x, _, name=f"{name}.proj": add(masked, name, x)
        elif subject.model.residual == "ms":
            continue
        elif isinstance(module, Block) or name.endswith(".embed"):
            callbacks[module] = lambda _, output, name=name: add_integers(name, output)
        elif isinstance(module, SpikingMLP):  # its input is the residual sum after the attention
            name = name.replace(".mlp", ".attn")
            callbacks[module] = lambda x, _, name=name: add_integers(name, x)
    samples = subject.evaluate(callbacks)
    most = max((len(count) for batches in counts.values() for count in batches), default=0)
    total = {name: sum(F.pad(n, (0, most - len(n))) for n in batches) for name, batches in counts.items()}
    spikes, masked = ({name: sum(rows).cpu() / samples for name, rows in rates.items()} for rates in (spikes, masked))
    return Rates(spikes, {name: (count / count.sum()).cpu() for name, count in total.items()}, masked)


def table(rates: Rates) -> list[dict]:
    """Return the rows of the paper's table, next to the paper's figures."""
    paper, layers, rows = published("firing_rates"), rates.spikes | rates.masked, []
    for stage in sorted({int(name.split(".")[1]) for name in layers if ".blocks." in name}):
        figures = dict(enumerate(paper["stages"])).get(stage, {})
        for layer, end in paper["layers"].items():
            start = f"stages.{stage}.blocks."
            blocks = [rate.mean() for name, rate in layers.items() if name.startswith(start) and name.endswith(end)]
            if blocks:
                row = {"stage": stage + 1, "layer": layer, "firing rate": torch.stack(blocks).mean().item()}
                rows.append(row | {f"{paper['network']}, paper (to be verified)": figures.get(layer)})
    return rows


def draw(rates: Rates, title: str, path: Path) -> None:
    """Draw firing rates as bars with a dot per time step, and the integers as stacked bars below."""
    panels = 2 if rates.integers else 1
    with drawing(path, panels, 1, (max(8, 0.26 * len(rates.spikes)), 4.5 * panels), grid="y") as (figure, axes):
        figure.suptitle(title)
        means = [values.mean().item() for values in rates.spikes.values()]
        axes[0].bar(range(len(means)), means, color="lightsteelblue")
        steps = torch.stack([*rates.spikes.values()], 1).tolist()  # [T][layers]
        for t, values in enumerate(steps):
            axes[0].plot(values, ".", color=colormaps["viridis"](t / max(1, len(steps) - 1)), label=f"t = {t}")
        axes[0].set(ylabel="firing rate", title="Spikes: mean output of each LIF; bars are means over time")
        if rates.integers:
            shares = torch.stack([*rates.integers.values()], 1).numpy()  # [values,layers]
            for value in range(1, len(shares)):
                colour = colormaps["YlOrBr"](0.2 + 0.8 * (value - 1) / max(1, len(shares) - 2))
                below = shares[1:value].sum(0)
                axes[1].bar(range(shares.shape[1]), shares[value], bottom=below, color=colour, label=value)
            axes[1].set(ylabel="share of the values", title="SEW residuals: nonzero integers")
        for axis, names in zip(axes, rates, strict=False):
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
            if axis.get_legend_handles_labels()[0]:  # none where all integers are 0
                axis.legend(ncols=4, fontsize=8)
            axis.margins(x=0.01)


def write(rates: Rates, title: str, folder: Path, suffix: str) -> None:
    """Write the tables and the figure of one network."""
    rows = [
        {"layer": name, "rate": values.mean().item()} | {f"t = {t}": rate for t, rate in enumerate(values.tolist())}
        for name, values in rates.spikes.items()
    ]
    write_csv(folder / f"firing_rates{suffix}.csv", rows)
    if rates.integers:
        shares = {name: values.tolist() for name, values in rates.integers.items()}
        integers = [
            {"after": name, "mean": sum(n * share for n, share in enumerate(row)), **dict(enumerate(row))}
            for name, row in shares.items()
        ]
        write_csv(folder / f"integers{suffix}.csv", integers)
    draw(rates, title, folder / f"firing_rates{suffix}.png")
    silent = [row["layer"] for row in rows if row["rate"] == 0]
    stages = {}
    for row in rows:
        stages.setdefault(".".join(row["layer"].split(".")[:2]), []).append(row["rate"])
    logger.info(f"{title}: firing rate, mean (min to max) of the neuron layers")
    for stage, values in stages.items():
        logger.info(f"  {stage}: {statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
    logger.info(f"  silent layers: {', '.join(silent) or 'none'}; written to {folder}")


def run(argv: Sequence[str]) -> None:
    flag = {"action": "store_true", "help": "also print and write the paper's table"}
    args, loaded = subjects(__doc__, argv, table=flag)
    for subject in loaded:
        suffix = f"-{subject.name}" if len(loaded) > 1 else ""
        title, rates = f"{subject.cfg.model} on {subject.cfg.dataset}, {subject.path}", measure(subject)
        write(rates, title, args.output_dir, suffix)
        if args.table:
            rows = table(rates)
            write_csv(args.output_dir / f"firing_rates_table{suffix}.csv", rows)
            logger.info(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4f"))


if __name__ == "__main__":
    main(run)
