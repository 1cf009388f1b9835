"""Growth of time and memory with the size of a network or of an attention, along one axis at a time.

    python -m benchmarks.growth                          # networks: T, resolution, width and batch
    python -m benchmarks.growth --axes tokens channels   # attentions: tokens N and channels D
    python -m benchmarks.growth --memory                 # attentions: bytes at the sizes of the paper

Networks: training steps ("train") and evaluation ("eval") on noise, ours and the baseline in turns as in
benchmarks.speed. Attentions: time of forward and backward pass, and counted operations. Self-attention runs as
q (k^T v) (this project) and as (q k^T) v (the paper's equation). "core" runs from the spikes of q, k and v to those
before the projection; "module" adds the projections.

Memory is the peak on CUDA, and on a CPU the bytes that autograd keeps for the backward pass. Exponents are slopes in
the log-log plot over the larger half of the sizes, because small sizes measure the launch of kernels. Every point
goes to growth-DATE-DEVICE.json; on the same day the same command resumes.
"""

import argparse
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tabulate import tabulate

from analysis.attentions import PARTS, Attention, memory
from analysis.common import drawing, main, positive
from engine.cli import UserError
from engine.config import Config

from .common import CONFIGURATIONS, Results, network, random_batch, recipe
from .sides import all_sides
from .speed import flags_of, start
from .turns import STEPS, Timed, Turns


class Axis(NamedTuple):
    """Axis with its sizes, and its size while another axis grows, per kind of device."""

    letter: str
    power: int  # of the flag's value that gives the plotted size
    cuda: tuple[list[int], int]
    cpu: tuple[list[int], int]


AXES = {
    "time_steps": Axis("T", 1, ([1, 2, 4, 8], 4), ([1, 2, 4, 8], 4)),
    "input_size": Axis("N", 2, ([96, 128, 192, 256, 384], 224), ([8, 12, 16, 24, 32], 16)),  # N grows with the pixels
    "width": Axis("D", 1, ([96, 192, 384, 768], 384), ([32, 64, 128, 256], 64)),
    "batch_size": Axis("B", 1, ([4, 8, 16, 32, 64], 16), ([2, 4, 8, 16], 8)),
    "tokens": Axis("N", 1, *[([49, 100, 196, 400, 784, 1600, 3136], 784)] * 2),
    "channels": Axis("D", 1, *[([96, 192, 384, 768, 1536], 384)] * 2),
}
ATTENTION_AXES = ("tokens", "channels")
MODELS = {"cuda": "qkformer_10_384", "cpu": "qkformer_3_64"}
COLUMNS = {"ms": ("time (ms)", 1), "memory_bytes": ("memory (MB)", 1e6), "operations": ("operations (million)", 1e6)}


class Point(NamedTuple):
    """Size along an axis, with the sizes along all others."""

    axis: str
    size: int  # as plotted
    at: dict[str, int]  # flag values

    def config(self, model: str) -> Config:
        """Return the recipe of a network at this point."""
        keys = ("time_steps", "input_size", "batch_size")
        return recipe(model, **{key: self.at[key] for key in keys})

    def attention(self, kind: str, part: str, heads: int) -> Attention:
        """Return an attention at this point."""
        return Attention(kind, part, self.at["tokens"], self.at["channels"], heads)


def start_side(point: Point, mode: str, side: str, args: argparse.Namespace, device: torch.device) -> Timed:
    """Prepare a step of an attention, or of a network with fixed initial weights."""
    if mode in PARTS:
        step, spikes, parameters = point.attention(side, mode, args.heads).step(device)
        return Timed(lambda: step, spikes, device, parameters)
    torch.manual_seed(0)
    cfg, backend = point.config(args.model), all_sides(args.model, mode, device)[side].lif_backend
    model = network(cfg, width=point.at["width"], lif_backend=backend)
    parameters = model.parameters() if mode == "train" else None
    return Timed(lambda: STEPS[mode](model.to(device), args.amp, device), random_batch(cfg, device), device, parameters)


def measure(point: Point, mode: str, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Time the sides in turns; return a row for each. The first is the baseline."""
    names = PARTS[mode] if mode in PARTS else (next(iter(all_sides(args.model, mode, device))), "ours")
    with Turns(f"{point.axis} {point.size} {mode}", device) as turns:
        for name in names:
            turns.start(name, functools.partial(start_side, point, mode, name, args, device))
        for _ in range(args.rounds):
            turns.round(args.steps)
    rows, samples = [], 1 if mode in PARTS else point.at["batch_size"]
    for name, figures in turns.figures(names, names[0], samples).items():
        row = {"axis": point.axis, "size": point.size, "mode": mode, "side": name, "figures": figures}
        if "ms" in figures:
            row |= {"ms": figures["ms"]["median"], "memory_bytes": figures["peak_bytes"]}
        if mode in PARTS:
            row["operations"] = point.attention(name, mode, args.heads).operations()
        rows.append(row)
    return rows


def fitted_sizes(sizes: Iterable[int]) -> list[int]:
    """Return the larger half of the sizes, at least two."""
    sizes = sorted(set(sizes))
    return sizes[-max(2, (len(sizes) + 1) // 2) :]


def exponent(rows: Sequence[dict], column: str) -> float | None:
    """Fit the slope of log(`column`) against log(size); None with fewer than two sizes."""
    rows = [row for row in rows if row.get(column)]
    fitted = fitted_sizes(row["size"] for row in rows)
    if len(fitted) < 2:
        return None
    points = [(row["size"], row[column]) for row in rows if row["size"] in fitted]
    return round(float(np.polyfit(*np.log(np.array(points, float)).T, 1)[0]), 6) + 0.0  # not -0.0


def lines(rows: Sequence[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """Group the rows by axis, mode and side."""
    groups = {}
    for row in rows:
        groups.setdefault((row["axis"], row["mode"], row["side"]), []).append(row)
    return groups


def exponents(rows: Sequence[dict]) -> list[dict]:
    """Return the exponents of each line."""
    return [
        {"axis": axis, "mode": mode, "side": side, "fitted": fitted_sizes(row["size"] for row in line)}
        | {column: exponent(line, column) for column in COLUMNS}
        for (axis, mode, side), line in lines(rows).items()
    ]


def draw(rows: Sequence[dict], title: str, path: Path) -> None:
    """Draw each column of each mode against the size, a column of panels for each axis."""
    groups = lines(rows)
    axes = list(dict.fromkeys(axis for axis, *_ in groups))
    panels = dict.fromkeys((mode, key) for key in COLUMNS for row in rows if row.get(key) for mode in [row["mode"]])
    size = (3.6 * len(axes) + 0.6, 3 * len(panels) + 0.6)
    with drawing(path, len(panels), len(axes), size, sharey="row") as (figure, plots):
        places = ((mode, column, axis) for mode, column in panels for axis in axes)
        for plot, (mode, column, axis) in zip(plots, places, strict=True):
            letter, (name, unit) = AXES[axis].letter, COLUMNS[column]
            for (_, _, side), line in (item for item in groups.items() if item[0][:2] == (axis, mode)):
                points = [(row["size"], row[column] / unit) for row in line if row.get(column)]
                if points:
                    power = exponent(line, column)
                    label = side if power is None else f"{side}: ${letter}^{{{power:.2f}}}$"
                    plot.plot(*zip(*points, strict=True), "o-", label=label)
                    plot.legend(fontsize=8)
            plot.set(xscale="log", yscale="log", xlabel=f"{letter}, {axis.replace('_', ' ')}")
            sizes = sorted({row["size"] for row in rows if row["axis"] == axis})
            plot.set_xticks(sizes, sizes, fontsize=8)
            plot.minorticks_off()
            plot.set_title(f"{mode}: {name}", fontsize=10)
        figure.suptitle(title, fontsize=11)


def chosen(args: argparse.Namespace, device: torch.device) -> list[Point]:
    """Return the points that the flags ask for; raise `UserError` for sizes that do not fit."""
    args.model = args.model or MODELS[device.type]
    for name, axis in AXES.items():
        sizes, at = getattr(axis, device.type)
        setattr(args, name, sorted(set(getattr(args, name) or sizes)))
        setattr(args, f"at_{name}", getattr(args, f"at_{name}") or at)
    fixed = {name: getattr(args, f"at_{name}") for name in AXES}
    points = []
    for axis in args.axes:
        if len(sizes := getattr(args, axis)) < 2:
            raise UserError(f"--{axis.replace('_', '-')} {sizes[0]}: one size gives no exponent; add another")
        points += [Point(axis, size ** AXES[axis].power, fixed | {axis: size}) for size in sizes]
    for point in points:
        if point.axis in ATTENTION_AXES and point.at["channels"] % args.heads:
            raise UserError(f"--heads {args.heads}: does not divide {point.at['channels']} channels; use a divisor")
        try:
            with torch.device("meta"):
                network(point.config(args.model), width=point.at["width"])
        except ValueError as error:
            raise UserError(f"width {point.at['width']}: {error}") from None
    return points


def run(argv: Sequence[str]) -> None:
    flags = flags_of(__doc__, (*STEPS, *PARTS), rounds=3)
    flags.add_argument("--model", choices=CONFIGURATIONS, help="network (qkformer_10_384; on a CPU qkformer_3_64)")
    flags.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES)[:4], help="axes to grow (the first four)")
    flags.add_argument("--heads", type=positive, default=6, help="heads of the attentions, of growing width (6)")
    for axis in AXES:
        name = axis.replace("_", "-")
        flags.add_argument(f"--{name}", type=positive, nargs="+", help="sizes along this axis")
        flags.add_argument(f"--at-{name}", type=positive, help="size while another axis grows")
    flags.add_argument("--memory", action="store_true", help="only print the attentions' memory (MiB)")
    args = flags.parse_args(argv)
    if args.memory:
        print(tabulate(memory(), headers="keys", floatfmt=".2f"))
        return
    device = start(args)
    points = chosen(args, device)
    fixed = [f"at_{name}" for name in AXES]
    file = Results("growth", args, device, ("model", "amp", "heads", "rounds", "steps", *fixed))
    for point in points:
        modes = PARTS if point.axis in ATTENTION_AXES else STEPS
        for mode in (mode for mode in modes if mode in args.modes):
            if not any((row["axis"], row["size"], row["mode"]) == (point.axis, point.size, mode) for row in file.all):
                file.write(measure(point, mode, args, device))
    title = f"{args.model}, amp {args.amp}, on {file.device}; attentions: {args.heads} heads\nwhere another grows: "
    title += ", ".join(f"{name[3:]} {getattr(args, name)}" for name in fixed)
    draw(file.all, title, file.path.with_suffix(".png"))
    print(f"\n{title}\n{tabulate(exponents(file.all), headers='keys', floatfmt='.2f')}\n\n{file.path}")


if __name__ == "__main__":
    main(run)
