"""How time and memory of a step grow with T, resolution, width and batch, one at a time: ours beside the baseline.

Training steps and evaluation of a recipe's network on noise, with the sides in turns as in benchmarks/speed.py. Memory
is the peak on CUDA, and on a CPU what autograd keeps for the backward pass. Exponents are slopes in the log-log plot,
fitted to the larger half of the sizes: at small ones the time is that of starting the kernels.

Results are appended to growth-DATE-DEVICE.json, with a picture beside it, and exponents are printed: the axes can be
measured one by one.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from analysis.common import main, parser, positive
from analysis.growth import KeptBytes, exponent, fitted_sizes
from engine.cli import UserError
from engine.config import Config, load

from .common import (
    RESULTS,
    ROOT,
    STEPS,
    Timed,
    Turns,
    choose,
    machine,
    network,
    random_batch,
    result_path,
    runs_in,
    save_picture,
    write,
)
from .speed import CONFIGURATIONS, DTYPES, PACKAGES, all_sides

AXES = {  # what grows -> its letter, and the power of the setting that it is
    "time_steps": ("T", 1),
    "input_size": ("N", 2),  # tokens grow with the pixels
    "width": ("D", 1),
    "batch_size": ("B", 1),
}
SIZES = {  # what is measured where nothing else is asked for: small networks on a CPU
    "cuda": {
        "model": "qkformer_10_384",
        "time_steps": [1, 2, 4, 8],
        "input_size": [96, 128, 192, 256, 384],
        "width": [96, 192, 384, 768],
        "batch_size": [4, 8, 16, 32, 64],
        "at": [4, 224, 384, 16],
    },
    "cpu": {
        "model": "qkformer_3_64",
        "time_steps": [1, 2, 4, 8],
        "input_size": [8, 12, 16, 24, 32],
        "width": [32, 64, 128, 256],
        "batch_size": [2, 4, 8, 16],
        "at": [4, 16, 64, 8],
    },
}
PANELS = (  # mode, column, title, unit
    ("train", "ms", "training step (ms)", 1),
    ("eval", "ms", "evaluation (ms)", 1),
    ("train", "memory_bytes", "memory of a training step (MB)", 1e6),
    ("eval", "memory_bytes", "memory of an evaluation (MB)", 1e6),
)


class Point(NamedTuple):
    """A network with its batch, where `axis` has a size and the others stay."""

    axis: str
    size: int
    cfg: Config
    width: int


def start(at: Point, mode: str, backend: str, amp: str, device: torch.device) -> Timed:
    """A step ready to be timed; on a CPU its `peak_bytes` are those kept for the backward pass."""
    torch.manual_seed(0)
    model = network(at.cfg, width=at.width, lif_backend=backend)
    timed = Timed(lambda: STEPS[mode](model.to(device), amp, device), random_batch(at.cfg, device), device)
    if device.type == "cpu" and mode == "train":
        kept = KeptBytes(model.parameters())
        with kept:
            timed.step(*timed.batch)
        timed.peak_bytes = kept.total
    return timed


def measure(at: Point, mode: str, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each side."""
    sides = all_sides(at.cfg.model, mode, device)
    baseline = next(iter(sides))
    with Turns(f"{at.axis} {at.size} {mode}", device) as turns:
        for name in (baseline, "ours"):
            turns.start(name, functools.partial(start, at, mode, sides[name].lif_backend, args.amp, device))
        for _ in range(args.rounds):
            turns.round(args.steps)
    rows = []
    for name, figures in turns.figures((baseline, "ours"), baseline, at.cfg.batch_size).items():
        row = {"axis": at.axis, "size": at.size, "mode": mode, "side": name}
        if "ms" in figures:
            row |= {"ms": figures["ms"]["median"], "memory_bytes": figures["peak_bytes"]}
        rows.append(row | {"figures": figures})
    return rows


def line(rows: Sequence[dict], axis: str, mode: str, side: str, column: str) -> list[dict]:
    """The points of a side along an axis where there is a figure."""
    return [
        row
        for row in rows
        if (row["axis"], row["mode"], row["side"]) == (axis, mode, side) and row.get(column) is not None
    ]


def slope(points: Sequence[dict], column: str) -> float | None:
    """The exponent of a line; None where it has fewer than two points."""
    return exponent(points, "size", column) if len(points) > 1 else None


def exponents(rows: Sequence[dict]) -> list[dict]:
    """The exponents of all that was measured, for each axis and side."""
    found = []
    for axis, side in dict.fromkeys((row["axis"], row["side"]) for row in rows):
        values = {f"{m} {c}": slope(line(rows, axis, m, side, c), c) for m, c, *_ in PANELS}
        sizes = {row["size"] for row in rows if row["axis"] == axis}
        found.append({"axis": axis, "side": side, "fitted": fitted_sizes(sizes)} | values)
    return found


def table(found: Sequence[dict]) -> str:
    """The exponents, to read."""
    panels = [(title, f"{mode} {column}") for mode, column, title, _ in PANELS]
    panels = [(title, key) for title, key in panels if any(row[key] is not None for row in found)]
    body = [
        [
            f"{AXES[row['axis']][0]} = {', '.join(map(str, row['fitted']))}",
            row["side"],
            *("" if row[key] is None else f"{row[key]:.2f}" for _, key in panels),
        ]
        for row in found
    ]
    return "Exponents\n" + tabulate(body, ["fitted at", "side", *(title for title, _ in panels)], disable_numparse=True)


def draw(rows: Sequence[dict], title: str) -> Figure:
    """Time and memory against the size, a column an axis."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    sides = list(dict.fromkeys(row["side"] for row in rows))
    panels = [panel for panel in PANELS if any(line(rows, axes[0], panel[0], side, panel[1]) for side in sides)]
    figure = Figure(figsize=(3.6 * len(axes) + 0.6, 3 * len(panels) + 0.6), layout="constrained")
    grid = figure.subplots(len(panels), len(axes), squeeze=False, sharey="row")
    for (mode, column, name, unit), row_of_plots in zip(panels, grid, strict=True):
        for axis, plot in zip(axes, row_of_plots, strict=True):
            letter = AXES[axis][0]
            for side in sides:
                points = line(rows, axis, mode, side, column)
                power = slope(points, column)
                label = side if power is None else f"{side}: ${letter}^{{{power:.2f}}}$"
                plot.plot([p["size"] for p in points], [p[column] / unit for p in points], "o-", label=label)
            sizes = sorted({row["size"] for row in rows if row["axis"] == axis})
            plot.set(xscale="log", yscale="log")
            plot.set_xlabel(f"{letter}, pixels" if axis == "input_size" else f"{letter}, {axis.replace('_', ' ')}")
            plot.set_title(name, fontsize=10)
            plot.set_xticks(sizes, sizes, fontsize=8)
            plot.set_xticks([], minor=True)
            plot.grid(alpha=0.25)
            plot.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def run(argv: Sequence[str]) -> None:
    ours = parser(__doc__)
    ours.add_argument("--model", choices=CONFIGURATIONS, help="(qkformer_10_384; on a CPU qkformer_3_64)")
    ours.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="what grows (all)")
    for axis in AXES:
        name = axis.replace("_", "-")
        ours.add_argument(f"--{name}", type=positive, nargs="+", help="its sizes (four or five)")
        ours.add_argument(f"--at-{name}", type=positive, help="its size while another grows")
    ours.add_argument("--modes", nargs="+", choices=STEPS, default=list(STEPS), help="(both)")
    ours.add_argument("--rounds", type=positive, default=3, help="in each of which both sides have their turn (3)")
    ours.add_argument("--steps", type=positive, default=5, help="timed in a turn (5)")
    ours.add_argument("--amp", choices=DTYPES, default="fp16", help="(fp16; off on a CPU, where that is what it means)")
    ours.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    ours.add_argument("--output", type=Path, default=RESULTS, help=f"folder to write to ({RESULTS})")
    args = ours.parse_args(argv)
    device = choose(args.device)
    points = chosen(args, device)
    here = machine("growth", PACKAGES, device)
    rows = []
    for at in points:
        for mode in args.modes:
            rows += measure(at, mode, args, device)
    path = result_path(args.output, "growth", here["device"])
    earlier = runs_in(path)
    fixed = ", ".join(f"{AXES[axis][0]} = {getattr(args, f'at_{axis}') ** AXES[axis][1]}" for axis in AXES)
    title = f"{args.model} on {here['device'].get('gpu', 'a CPU')}, amp {args.amp}; where another grows, {fixed}"
    this = here | {"title": title, "arguments": vars(args), "exponents": exponents(rows), "points": rows}
    write(path, {"runs": [*earlier, this]})
    save_picture(draw(latest([*earlier, this]), title), path)
    print(f"\n{title}\n{table(this['exponents'])}\n\n{path}")


def latest(runs: Sequence[dict]) -> list[dict]:
    """The points of all runs of the last one's title; of what was measured twice, the last."""
    rows = [row for run in runs if run["title"] == runs[-1]["title"] for row in run["points"]]
    return list({(row["axis"], row["size"], row["mode"], row["side"]): row for row in rows}.values())


def chosen(args: argparse.Namespace, device: torch.device) -> list[Point]:
    """The points that the flags ask for, which are completed; raises `UserError` for sizes that cannot be."""
    own = SIZES[device.type]
    args.model = args.model or own["model"]
    if device.type == "cpu" and args.amp == "fp16":
        args.amp = "off"  # as in training
    for axis, at in zip(AXES, own["at"], strict=True):
        setattr(args, axis, sorted(set(getattr(args, axis) or own[axis])))
        setattr(args, f"at_{axis}", getattr(args, f"at_{axis}") or at)
        if len(getattr(args, axis)) < 2:
            raise UserError(f"--{axis.replace('_', '-')}: an exponent needs two sizes at least")
    fixed = {axis: getattr(args, f"at_{axis}") for axis in AXES}
    points = []
    for axis in args.axes:
        for size in getattr(args, axis):
            sizes = fixed | {axis: size}
            width = sizes.pop("width")
            cfg = load(ROOT / CONFIGURATIONS[args.model][0], [f"--{key}={value}" for key, value in sizes.items()])
            points.append(Point(axis, size ** AXES[axis][1], cfg, width))
    for width in {at.width for at in points}:
        try:
            network(points[0].cfg, width=width)
        except ValueError as error:
            raise UserError(f"width {width}: {error}") from None
    return points


if __name__ == "__main__":
    main(run)
