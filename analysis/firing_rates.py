"""How often the neurons of a trained network fire, layer by layer, and what its SEW residuals add up to.

    python -m analysis.firing_rates --checkpoint output/first/best.pt

Spikes are the outputs of the LIF neurons: their mean over the test set is the firing rate, for each time step. What the
blocks hand on is no spike but, with SEW residuals, a sum of spikes: a small integer, whose distribution is shown apart
(with membrane shortcuts it is a current, and left out). Writes firing_rates.csv, integers.csv and firing_rates.png.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from engine.log import logger, progress
from models import LIF
from models.layers import SpikingMLP
from models.qkformer import Block

from .common import Subject, checkpoint_parser, main, short_names, subjects, write_csv


class Rates(NamedTuple):
    """Of each layer, by the module's name and in the order of execution."""

    spikes: dict[str, Tensor]  # firing rate [T] of each LIF
    integers: dict[str, Tensor]  # share of each integer, from 0 on, behind each residual; none with membrane shortcuts


@torch.inference_mode()
def measure(subject: Subject) -> Rates:
    """The means over the test set."""
    spikes, integers, handles = {}, {}, []

    def fired(name: str, output: Tensor) -> None:
        spikes.setdefault(name, []).append(output.flatten(1).double().mean(1) * output.shape[1])  # [T]

    def added(name: str, output: Tensor) -> None:
        integers.setdefault(name, []).append(torch.bincount(output.flatten().long()))

    for name, module in subject.model.named_modules():
        if isinstance(module, LIF):
            handles.append(module.register_forward_hook(lambda *call, name=name: fired(name, call[2])))
        elif subject.cfg.residual == "ms":
            continue
        elif isinstance(module, Block) or name.endswith(".embed"):
            handles.append(module.register_forward_hook(lambda *call, name=name: added(name, call[2])))
        elif isinstance(module, SpikingMLP):
            name = name.replace(".mlp", ".attn")  # its input is the sum behind the attention
            handles.append(module.register_forward_pre_hook(lambda *call, name=name: added(name, call[1][0])))
    samples = 0
    for images, _ in progress(subject.data.test, "samples", subject.cfg.log_interval, subject.here.is_main):
        subject.model(images)
        samples += len(images)
    for handle in handles:
        handle.remove()
    most = max((len(counts) for batches in integers.values() for counts in batches), default=0)
    total = {name: sum(F.pad(n, (0, most - len(n))) for n in batches) for name, batches in integers.items()}
    return Rates(
        {name: torch.stack(batches).sum(0).cpu() / samples for name, batches in spikes.items()},
        {name: (counts / counts.sum()).cpu() for name, counts in total.items()},
    )


def draw(rates: Rates, title: str, path: Path) -> None:
    """Firing rates as bars with a dot per time step; below them the integers as stacked bars."""
    panels = 2 if rates.integers else 1
    figure = Figure(figsize=(max(8, 0.26 * len(rates.spikes)), 4.5 * panels), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    axes[0].bar(
        range(len(rates.spikes)), [values.mean().item() for values in rates.spikes.values()], color="lightsteelblue"
    )
    steps = torch.stack([*rates.spikes.values()], 1).tolist()  # [T][layers]
    for t, values in enumerate(steps):
        colour = colormaps["viridis"](t / max(1, len(steps) - 1))
        axes[0].plot(values, ".", color=colour, label=f"t = {t}")
    axes[0].set(ylabel="firing rate", title="Spikes: mean output of each LIF; bars over all time steps")
    if rates.integers:
        shares = torch.stack([*rates.integers.values()], 1).numpy()  # [values,layers]
        for value in range(1, len(shares)):
            colour = colormaps["YlOrBr"](0.2 + 0.8 * (value - 1) / max(1, len(shares) - 2))
            axes[1].bar(range(shares.shape[1]), shares[value], bottom=shares[1:value].sum(0), color=colour, label=value)
        axes[1].set(ylabel="share of the values", title="SEW residuals: integers that are not 0")
    for axis, names in zip(axes, rates, strict=False):
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        if axis.get_legend_handles_labels()[0]:  # none where all integers are 0
            axis.legend(ncols=4, fontsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.margins(x=0.01)
    figure.savefig(path, dpi=110)


def write(rates: Rates, title: str, folder: Path, suffix: str) -> None:
    """The tables and the picture of one network."""
    spikes, integers, picture = (
        folder / f"{name}{suffix}.{kind}"
        for name, kind in (("firing_rates", "csv"), ("integers", "csv"), ("firing_rates", "png"))
    )
    rows = [
        {"layer": name, "rate": values.mean().item()} | {f"t = {t}": rate for t, rate in enumerate(values.tolist())}
        for name, values in rates.spikes.items()
    ]
    write_csv(spikes, rows)
    if rates.integers:
        means = {name: (shares * torch.arange(len(shares))).sum().item() for name, shares in rates.integers.items()}
        columns = {name: dict(enumerate(shares.tolist())) for name, shares in rates.integers.items()}
        write_csv(integers, [{"behind": name, "mean": means[name]} | columns[name] for name in means])
    draw(rates, title, picture)
    silent = [row["layer"] for row in rows if row["rate"] == 0]
    logger.info(f"{title}: firing rates {min(r['rate'] for r in rows):.4f} to {max(r['rate'] for r in rows):.4f}")
    logger.info(f"silent: {', '.join(silent) or 'none'}; written: {spikes}, {picture}")


def run(argv: Sequence[str]) -> None:
    args, flags = checkpoint_parser(__doc__).parse_known_args(argv)
    for subject, label in zip(subjects(args, flags), short_names(args.checkpoint), strict=True):
        suffix = f"-{label}" if len(args.checkpoint) > 1 else ""
        title = f"{subject.cfg.model} on {subject.cfg.dataset}, {subject.path}"
        write(measure(subject), title, args.output_dir, suffix)


if __name__ == "__main__":
    main(run)
