"""How the attentions grow with the tokens N and the channels D: operations, time and memory, counted and measured.

Q-K attention is linear in both. Self-attention is linear in N and quadratic in D as q (k^T v), the order of this
project, and quadratic in N and linear in D as (q k^T) v, the order of the paper's equation. What is compared is the
core of each attention, from the spikes of q, k and v to those handed to the projection, and the whole module with its
projections, which are quadratic in D in all of them. Exponents are slopes in the log-log plot, fitted to the larger
half of the sizes: at small ones the time is that of starting the kernels.

Writes growth.csv (each point) and growth.png, and prints the exponents.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from engine.cli import UserError
from engine.log import progress, setup_console
from engine.world import setup
from models.attention import SpikingSelfAttention
from models.qkformer import ATTENTIONS

from .common import COLOURS, main, parser, positive, write_csv

FIRING_RATE = 0.2


class QuadraticSelfAttention(SpikingSelfAttention):
    """Self-attention as (q k^T) v: the same spikes as from q (k^T v), through a map of tokens by tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Spikes [T,B,h,d,N] of query, key and value to spikes of the same shape."""
        qk = k.mT @ q  # [T,B,h,N,N], the transpose of q k^T with tokens as rows
        return self.attn_lif(v @ qk * self.scale)


MODULES = ATTENTIONS | {"quadratic": QuadraticSelfAttention}
LABELS = {"token": "Q-K token", "channel": "Q-K channel", "self": "self, q (kᵀ v)", "quadratic": "self, (q kᵀ) v"}
SERIES = [("core", kind) for kind in MODULES] + [("module", kind) for kind in ATTENTIONS]
COLUMNS = {
    "operations": "operations (counted)",
    "map_elements": "map (counted)",
    "time_ms": "time",
    "kept_bytes": "kept for backward",
    "peak_bytes": "peak memory",
}
PANELS = (  # column, title, unit
    ("operations", "counted operations of a time step (million)", 1e6),
    ("time_ms", "measured time, forward + backward (ms)", 1),
    ("kept_bytes", "measured memory kept for backward (MB)", 1e6),
)


def counted(kind: str, n: int, d: int, heads: int) -> dict[str, int]:
    """What the core of an attention takes at n tokens and d channels, of one sample at one time step.

    Returns:
        operations: additions or multiply-accumulates; the neurons and the scale before them are not counted.
        map_elements: elements of what stands between the tokens: the mask, k^T v or q k^T.
    """
    operations, elements = {
        "token": (2 * n * d, heads * n),  # the sum over the query, and the mask on the key
        "channel": (2 * n * d, d),
        "self": (2 * n * d * d // heads, d * d // heads),
        "quadratic": (2 * n * n * d, heads * n * n),
    }[kind]
    return {"operations": operations, "map_elements": elements}


class Setting(NamedTuple):
    """What all points share."""

    heads: int
    time_steps: int
    batch_size: int
    repeats: int
    device: torch.device


def point(kind: str, part: str, tokens: int, channels: int, setting: Setting) -> dict:
    """One row of the table: an attention at one size; `part` is "core" or "module".

    Raises:
        UserError: the memory does not suffice.
    """
    attention = MODULES[kind](channels, setting.heads).to(setting.device)
    row = {"attention": kind, "part": part, "tokens": tokens, "channels": channels, "heads": setting.heads}
    row |= counted(kind, tokens, channels, setting.heads)
    if part == "module":
        row["operations"] += tokens * sum(p.numel() for p in attention.parameters() if p.dim() > 1)
    try:
        return row | measure(attention, part, tokens, channels, setting)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise UserError(
            f"not enough memory for {LABELS[kind]} attention at N = {tokens}, D = {channels}: "
            "take smaller --tokens or --channels"
        ) from None


def measure(attention: nn.Module, part: str, tokens: int, channels: int, setting: Setting) -> dict[str, float]:
    """Time (ms, median) of forward and backward pass and the bytes kept between them; on CUDA the peak bytes too."""
    leading, heads, device = (setting.time_steps, setting.batch_size), setting.heads, setting.device
    rng = torch.Generator().manual_seed(0)
    if part == "core":
        count = 3 if isinstance(attention, SpikingSelfAttention) else 2  # q, k and v, or q and k
        run, shape = attention.attend, (*leading, heads, channels // heads, tokens)
    else:
        count, run, shape = 1, attention, (*leading, channels, tokens, 1)
    *inputs, gradient = ((torch.rand(shape, generator=rng) < FIRING_RATE).float().to(device) for _ in range(count + 1))
    for x in inputs:
        x.requires_grad_()
    wanted = [*inputs, *attention.parameters()]

    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def once() -> float:
        finish()
        start = time.perf_counter()
        torch.autograd.grad(run(*inputs), wanted, gradient, allow_unused=True)  # the core uses no parameter
        finish()
        return 1000 * (time.perf_counter() - start)

    kept = KeptBytes(attention.parameters())
    with kept:
        once()
    peak = ""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        once()
        peak = torch.cuda.max_memory_allocated(device)
    return {
        "time_ms": statistics.median(once() for _ in range(setting.repeats)),
        "kept_bytes": kept.total,
        "peak_bytes": peak,
    }


class KeptBytes(saved_tensors_hooks):
    """While it is entered, `total` adds up the bytes that autograd keeps for the backward pass.

    Each storage counts once, and those of `parameters` not at all.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self.total, self._seen = 0, {p.untyped_storage().data_ptr() for p in parameters}
        super().__init__(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return x  # the graph holds it, so that no other tensor gets its address


def fitted_sizes(sizes: Iterable[int]) -> list[int]:
    """The larger half, at least two of them, to which exponents are fitted."""
    sizes = sorted(set(sizes))
    return sizes[-max(2, (len(sizes) + 1) // 2) :]


def exponent(rows: Sequence[dict], axis: str, column: str) -> float:
    """The slope of log(`column`) against log(`axis`) over the larger half of the sizes (least squares)."""
    fitted = fitted_sizes(row[axis] for row in rows)
    points = [(row[axis], row[column]) for row in rows if row[axis] in fitted]
    slope = np.polyfit(*np.log(np.array(points, float)).T, 1)[0]
    return round(float(slope), 6) + 0.0  # of a constant it is 0, and not -1e-16


class Sweep(NamedTuple):
    """Points along one axis, "tokens" or "channels", the other one fixed at `at`."""

    axis: str
    at: int
    rows: list[dict]

    @property
    def letters(self) -> tuple[str, str]:
        """Of what grows and of what is fixed."""
        return ("N", "D") if self.axis == "tokens" else ("D", "N")

    def line(self, kind: str, part: str) -> list[dict]:
        return [row for row in self.rows if (row["attention"], row["part"]) == (kind, part)]

    def table(self) -> str:
        """The exponents, to read."""
        columns = {key: name for key, name in COLUMNS.items() if self.rows[0][key] != ""}
        body = [
            [LABELS[kind], part, *(exponent(line, self.axis, column) for column in columns)]
            for part, kind in SERIES
            for line in [self.line(kind, part)]
        ]
        fitted, (grows, fixed) = fitted_sizes(row[self.axis] for row in self.rows), self.letters
        sizes = f"{grows} = {', '.join(map(str, fitted))}; {fixed} = {self.at}, {self.rows[0]['heads']} heads"
        headers = ["attention", "part", *columns.values()]
        return f"Exponents of {grows}, fitted at {sizes}\n{tabulate(body, headers, floatfmt='.2f')}"


def sweep(axis: str, sizes: Iterable[int], at: int, setting: Setting) -> Sweep:
    """Measure the cores and modules of all attentions at each size, the other axis fixed at `at`."""
    rows = []
    for size in progress(sorted(set(sizes)), axis, 1, show=True):
        tokens, channels = (size, at) if axis == "tokens" else (at, size)
        rows += [{"sweep": axis} | point(kind, part, tokens, channels, setting) for part, kind in SERIES]
    return Sweep(axis, at, rows)


def draw(sweeps: Sequence[Sweep], setting: Setting, path: Path) -> None:
    """Operations, time and memory against the size, a row a sweep."""
    figure = Figure(figsize=(12.5, 8), layout="constrained")
    for axes, one in zip(figure.subplots(len(sweeps), 3), sweeps, strict=True):
        grows, fixed = one.letters
        sizes = sorted({row[one.axis] for row in one.rows})
        for axis, (column, title, unit) in zip(axes, PANELS, strict=True):
            for part, kind in SERIES:
                _draw_line(axis, one, part, kind, column, unit)
            axis.set(xscale="log", yscale="log", xlabel=f"{one.axis} {grows}  ({fixed} = {one.at})")
            axis.set_title(title, fontsize=11)
            axis.set_xticks(sizes, sizes)
            axis.tick_params(axis="x", which="minor", bottom=False)
            axis.grid(alpha=0.25)
            axis.set_ylim(top=10 * axis.get_ylim()[1])  # room for the legend
            axis.legend(fontsize=9, ncols=2, loc="upper left", columnspacing=1, handlelength=1.5)
    figure.suptitle(
        f"Growth of spiking attention: {setting.heads} heads, T = {setting.time_steps}, batch {setting.batch_size}, "
        f"{setting.device.type}.  Solid: the core, from q, k, v to the projection; dotted: the whole module.\n"
        "Exponents are of the core, fitted to the larger half of the sizes.",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def _draw_line(axis: Axes, one: Sweep, part: str, kind: str, column: str, unit: float) -> None:
    line = one.line(kind, part)
    look = {"color": COLOURS.get(kind, "dimgray"), "linewidth": 1.8, "markersize": 5}
    if kind == "token":  # channel attention lies upon it
        look |= {"linewidth": 5, "markersize": 9, "alpha": 0.5}
    if part == "core":
        look["label"] = f"{LABELS[kind]}: ${one.letters[0]}^{{{exponent(line, one.axis, column):.2f}}}$"
    x, y = [row[one.axis] for row in line], [row[column] / unit for row in line]
    axis.plot(x, y, "o-" if part == "core" else ":", **look)


def run(argv: Sequence[str]) -> None:
    ours = parser(__doc__)
    ours.add_argument("--output-dir", type=Path, default=Path("output/growth"), help="folder to write to")
    ours.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    ours.add_argument("--repeats", type=positive, default=5, help="times of which the median is taken (5)")
    ours.add_argument("--tokens", type=positive, nargs="+", default=[49, 100, 196, 400, 784, 1600, 3136], help="N")
    ours.add_argument("--channels", type=positive, nargs="+", default=[96, 192, 384, 768, 1536], help="D")
    ours.add_argument("--at-tokens", type=positive, default=784, help="N while D grows (784)")
    ours.add_argument("--at-channels", type=positive, default=384, help="D while N grows (384)")
    ours.add_argument("--heads", type=positive, default=6, help="fixed, so that a head grows with D (6)")
    ours.add_argument("--time-steps", type=positive, default=1, help="T (1)")
    ours.add_argument("--batch-size", type=positive, default=1, help="samples (1)")
    args = ours.parse_args(argv)
    for name in ("tokens", "channels"):
        if len(set(getattr(args, name))) < 2:
            raise UserError(f"--{name}: an exponent needs two sizes at least")
    for channels in (*args.channels, args.at_channels):
        if channels % args.heads:
            raise UserError(f"--heads {args.heads} does not divide {channels} channels: take multiples of it")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    setup_console(is_main=True)
    setting = Setting(args.heads, args.time_steps, args.batch_size, args.repeats, setup(args.device).device)
    sweeps = [
        sweep("tokens", args.tokens, args.at_channels, setting),
        sweep("channels", args.channels, args.at_tokens, setting),
    ]
    write_csv(args.output_dir / "growth.csv", [row for one in sweeps for row in one.rows])
    draw(sweeps, setting, args.output_dir / "growth.png")
    print(*(one.table() for one in sweeps), sep="\n\n")
    print(f"\nEach point is in {args.output_dir}/growth.csv, the picture in {args.output_dir}/growth.png.")


if __name__ == "__main__":
    main(run)
