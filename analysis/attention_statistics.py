"""Mean and variance of what the attention adds up, block by block: Q-K attention against spiking self-attention.

    python -m analysis.attention_statistics --checkpoint output/first/best.pt output/self/best.pt

What reaches the attention's neuron (threshold 0.5) is, in Q-K attention, a sum of the query's spikes over the d
channels of a head (token) or the N tokens (channel); in self-attention it is the product q (k^T v), times 0.125. The
paper argues that the sums need no scale, for they stay small where the product grows. Each block of each checkpoint is
measured over the test set, self-attention with the scale and without; beside it stands what independent spikes of the
same firing rates f would give:

    Q-K   mean n f_q                variance n f_q (1 - f_q)                n = d or N
    SSA   mean N d f_q f_k f_v      variance: the formula in `independent`

Writes attention_statistics.csv and .png.
"""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from engine.log import logger, progress
from models.attention import SSA_SCALE, ChannelQKAttention, SpikingSelfAttention, TokenQKAttention
from models.neuron import ATTN_THRESHOLD, LIF
from models.qkformer import Block

from .common import COLOURS, Subject, checkpoint_parser, main, short_names, subjects, write_csv

KINDS = {TokenQKAttention: "Q-K token", ChannelQKAttention: "Q-K channel", SpikingSelfAttention: "self"}


def independent(kind: str, rates: Sequence[float], width: int, tokens: int) -> tuple[float, float]:
    """Mean and variance of the sum if all spikes were independent.

    Args:
        kind: a value of `KINDS`; of "self" without the scale.
        rates: firing rates of q and k, and of v with "self".
        width: d, channels of a head.
        tokens: N.
    """
    if kind != "self":
        n, f = (width if kind == "Q-K token" else tokens), rates[0]
        return n * f, n * f * (1 - f)
    q, k, v = rates
    # sum over N tokens m and d channels c of q_c k_mc v_m: terms share v_m within a token and q_c within a channel
    mean = tokens * width * q * k * v
    second = q * k * v + (width - 1) * q * q * k * k * v + (tokens - 1) * q * k * k * v * v
    second += (width - 1) * (tokens - 1) * (q * k * v) ** 2
    return mean, tokens * width * second - mean**2


@torch.inference_mode()
def measure(subject: Subject) -> list[dict]:
    """A row for each block, and two (with the scale, without) for each of self-attention."""
    names = {module: name for name, module in subject.model.named_modules() if isinstance(module, Block)}
    sums, handles = {block: [] for block in names}, []

    def before_neuron(block: Block, lif: LIF, args: tuple) -> None:
        x = args[0].double()
        sums[block][-1] += [torch.tensor([x.numel(), x.sum(), x.square().sum()])]

    def attend(block: Block, own, *qkv: Tensor) -> Tensor:
        sums[block].append([torch.stack([spikes.double().mean() for spikes in qkv]).cpu(), *qkv[0].shape[3:]])
        return own(*qkv)

    for block in names:
        handles.append(block.attn.attn_lif.register_forward_pre_hook(functools.partial(before_neuron, block)))
        block.attn.attend = functools.partial(attend, block, block.attn.attend)
    for images, _ in progress(subject.data.test, "samples", subject.cfg.log_interval, subject.here.is_main):
        subject.model(images)
    for block, handle in zip(names, handles, strict=True):
        handle.remove()
        del block.attn.attend
    return [row for depth, block in enumerate(names, 1) for row in _rows(depth, names[block], block.attn, sums[block])]


def _rows(depth: int, name: str, attn, batches: list) -> list[dict]:
    counts = torch.stack([batch[-1] for batch in batches])  # [batches,3]
    size, total, squares = counts.sum(0).tolist()
    mean = total / size
    variance = squares / size - mean**2
    rates = (torch.stack([batch[0] for batch in batches]) * counts[:, :1]).sum(0) / size  # batches differ in size
    kind, scale = KINDS[type(attn)], getattr(attn, "scale", 1.0)
    width, tokens = batches[0][1:3]
    expected = independent(kind, rates.tolist(), width, tokens)
    factors = {"self scaled": SSA_SCALE, "self unscaled": 1.0} if kind == "self" else {kind: 1.0}
    return [
        {
            "depth": depth,
            "block": name,
            "attention": label,
            "mean": mean / scale * factor,
            "variance": variance * (factor / scale) ** 2,
            "independent mean": expected[0] * factor,
            "independent variance": expected[1] * factor**2,
            "N": tokens,
            "d": width,
            "firing rates": " ".join(f"{rate:.4f}" for rate in rates.tolist()),
        }
        for label, factor in factors.items()
    ]


def draw(tables: dict[str, list[dict]], path: Path) -> None:
    """Mean and variance over depth, a line for each checkpoint and kind; crosses for independent spikes."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    styles = {  # of each kind: marker, colour
        "Q-K token": ("o", COLOURS["token"]),
        "Q-K channel": ("s", COLOURS["channel"]),
        "self scaled": ("^", COLOURS["self"]),
        "self unscaled": ("v", "tab:orange"),
    }
    for (name, rows), line in zip(tables.items(), itertools.cycle(("-", "--", ":"))):
        for kind, (marker, colour) in styles.items():
            mine = [row for row in rows if row["attention"] == kind]
            depths = [row["depth"] for row in mine]
            for axis, what in zip(axes, ("mean", "variance"), strict=True) if mine else ():
                values, label = [row[what] for row in mine], f"{kind} ({name})"
                axis.plot(depths, values, line, marker=marker, color=colour, label=label)
                axis.plot(depths, [row[f"independent {what}"] for row in mine], "x", color=colour, alpha=0.6)
    axes[0].axhline(ATTN_THRESHOLD, color="grey", linewidth=0.8)
    for axis, what in zip(axes, ("mean", "variance"), strict=True):
        is_silent = not any(row[what] > 0 for rows in tables.values() for row in rows)
        axis.set(title=f"{what} of what the attention's neuron gets", xlabel="block")
        axis.set_yscale("linear" if is_silent else "log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right center", title="x: independent spikes\ngrey: threshold of the membrane"
    )
    figure.savefig(path, dpi=110)


def run(argv: Sequence[str]) -> None:
    args, flags = checkpoint_parser(__doc__).parse_known_args(argv)
    found = zip(short_names(args.checkpoint), subjects(args, flags), strict=True)
    tables = {label: measure(subject) for label, subject in found}
    rows = [{"checkpoint": name, **row} for name, table in tables.items() for row in table]
    csv, picture = (args.output_dir / f"attention_statistics.{kind}" for kind in ("csv", "png"))
    write_csv(csv, rows)
    draw(tables, picture)
    logger.info(tabulate(rows, headers="keys", floatfmt=".4g"))
    logger.info(f"written: {csv}, {picture}")


if __name__ == "__main__":
    main(run)
