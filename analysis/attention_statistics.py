"""Mean and variance of the attention's sums in each block, for Q-K attention and spiking self-attention.

    python -m analysis.attention_statistics --checkpoint output/first/best.pt output/self/best.pt

In Q-K attention the neuron reads a sum of query spikes over n = d channels of a head (token) or n = N tokens (channel).
In self-attention it reads q (k^T v) times 0.125. The table compares each with independent spikes of the same firing
rates f (Q-K: mean n f, variance n f (1 - f); self-attention: `independent`) and with the paper's bound (`bound`).
Writes attention_statistics.csv and .png.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

from engine.cli import UserError
from engine.log import logger
from models.attention import ChannelQKAttention, SpikingSelfAttention, TokenQKAttention
from models.neuron import ATTN_THRESHOLD
from models.qkformer import Block

from .common import Subject, drawing, main, subjects, write_csv

KINDS = {TokenQKAttention: "Q-K token", ChannelQKAttention: "Q-K channel", SpikingSelfAttention: "self"}
STYLES = [("Q-K token", "o", "tab:blue"), ("Q-K channel", "s", "tab:green")]  # kind, marker, colour
STYLES += [("self scaled", "^", "tab:red"), ("self unscaled", "v", "tab:orange")]


def independent(kind: str, rates: Sequence[float], width: int, tokens: int) -> tuple[float, float]:
    """Return mean and variance of the sum, without scale, for independent spikes of q, k (and v)."""
    if kind != "self":
        n, f = (width if kind == "Q-K token" else tokens), rates[0]
        return n * f, n * f * (1 - f)
    q, k, v = rates
    # sum over N tokens m and d channels c of q_c k_mc v_m: terms share v_m within a token and q_c within a channel
    mean = tokens * width * q * k * v
    second = q * k * v + (width - 1) * q * q * k * k * v + (tokens - 1) * q * k * k * v * v
    second += (width - 1) * (tokens - 1) * (q * k * v) ** 2
    return mean, tokens * width * second - mean**2


def bound(kind: str, width: int, tokens: int) -> float:
    """Return the paper's bound of the sum's variance: a quarter of the number of terms, assumed independent."""
    return {"Q-K token": width, "Q-K channel": tokens, "self": tokens * width}[kind] / 4


def measure(subject: Subject) -> list[dict]:
    """Return a row for each block; self-attention has two, with and without the scale."""
    blocks = {name: module.attn for name, module in subject.model.named_modules() if isinstance(module, Block)}
    if unknown := [type(attention).__name__ for attention in blocks.values() if type(attention) not in KINDS]:
        raise UserError(f"{subject.path}: no formula for {unknown[0]}; use a network with token, channel or self")
    sums, tokens, callbacks = {name: {} for name in blocks}, {}, {}

    def add(block: str, part: str, x: Tensor) -> None:
        moments = [x.numel(), x.sum(dtype=torch.float64), x.double().square().sum()]
        sums[block][part] = sums[block].get(part, 0) + torch.tensor(moments, dtype=torch.float64)

    for name, attention in blocks.items():
        callbacks[attention] = lambda x, _, name=name: tokens.update({name: x.shape[3:].numel()})
        callbacks[attention.attn_lif] = lambda x, _, name=name: add(name, "input", x)
        for unit in "qkv" if hasattr(attention, "v") else "qk":
            callbacks[getattr(attention, unit)] = lambda _, spikes, call=(name, unit): add(*call, spikes)
    subject.evaluate(callbacks)
    names = enumerate(blocks, 1)
    return [row for depth, name in names for row in _rows(depth, name, blocks[name], sums[name], tokens[name])]


def _rows(depth: int, name: str, attention: nn.Module, sums: dict[str, Tensor], tokens: int) -> list[dict]:
    """Convert sums (elements, sum, sum of squares) of the neuron's input and of q, k and v into rows."""
    size, total, squares = sums["input"].tolist()
    mean = total / size
    variance = squares / size - mean**2
    rates = [(sums[unit][1] / sums[unit][0]).item() for unit in "qkv" if unit in sums]
    kind, scale = KINDS[type(attention)], getattr(attention, "scale", 1.0)
    width = attention.q.conv.out_channels // attention.heads
    expected = independent(kind, rates, width, tokens)
    factors = {"self scaled": scale, "self unscaled": 1.0} if kind == "self" else {kind: 1.0}
    return [
        {
            "depth": depth,
            "block": name,
            "attention": label,
            "mean": mean / scale * factor,
            "variance": variance * (factor / scale) ** 2,
            "independent mean": expected[0] * factor,
            "independent variance": expected[1] * factor**2,
            "bound of the variance": bound(kind, width, tokens) * factor**2,
            "N": tokens,
            "d": width,
            "firing rates": " ".join(f"{rate:.4f}" for rate in rates),
        }
        for label, factor in factors.items()
    ]


def draw(tables: dict[str, list[dict]], path: Path) -> None:
    """Draw mean and variance over depth, a line for each checkpoint and kind; crosses for independent spikes."""
    with drawing(path, 1, 2, (13, 4.6), grid="both") as (figure, axes):
        for axis, moment in zip(axes, ("mean", "variance"), strict=True):
            for (name, rows), line in zip(tables.items(), itertools.cycle(("-", "--", ":"))):
                for kind, marker, colour in STYLES:
                    if points := [row for row in rows if row["attention"] == kind]:
                        depths, values = [row["depth"] for row in points], [row[moment] for row in points]
                        axis.plot(depths, values, line, marker=marker, color=colour, label=f"{kind} ({name})")
                        axis.plot(
                            depths, [row[f"independent {moment}"] for row in points], "x", color=colour, alpha=0.6
                        )
                        if moment == "variance":
                            bounds = [row["bound of the variance"] for row in points]
                            axis.plot(depths, bounds, "_", color=colour, markersize=14)
            is_silent = not any(row[moment] > 0 for rows in tables.values() for row in rows)
            axis.set(title=f"{moment} of the input of the attention's neuron", xlabel="block")
            axis.set_yscale("linear" if is_silent else "log")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].axhline(ATTN_THRESHOLD, color="grey", linewidth=0.8)
        legend = "x: independent spikes\ndash: bound of the paper\ngrey: threshold of the membrane"
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", title=legend)


def run(argv: Sequence[str]) -> None:
    args, loaded = subjects(__doc__, argv)
    tables = {subject.name: measure(subject) for subject in loaded}
    rows = [{"checkpoint": name, **row} for name, table in tables.items() for row in table]
    write_csv(args.output_dir / "attention_statistics.csv", rows)
    draw(tables, args.output_dir / "attention_statistics.png")
    logger.info(tabulate(rows, headers="keys", floatfmt=".4g"))
    logger.info(f"written: attention_statistics.csv and .png in {args.output_dir}")


if __name__ == "__main__":
    main(run)
