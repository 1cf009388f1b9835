"""What the figure of an architecture is made of: boxes and arrows, the input, and how each attention works, with spikes
that its own module computes. All coordinates are inches.
"""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle
from torch import Tensor

from models.attention import SSA_SCALE
from models.qkformer import ATTENTIONS

from .common import COLOURS

INK = "#222222"
NAMES = {"token": "Q-K token attention", "channel": "Q-K channel attention", "self": "spiking self-attention"}
FORMULAS = {
    "token": r"$y = \mathrm{LIF}\,(\Sigma_{\mathrm{channels}}\; q) \odot k$",
    "channel": r"$y = \mathrm{LIF}\,(\Sigma_{\mathrm{tokens}}\; q) \odot k$",
    "self": r"$y = \mathrm{LIF}\,(s \cdot v k^\mathsf{T} q),\ \ s = %g$",
}
COSTS = {
    "token": "a mask over the N tokens; 2ND operations",
    "channel": "a mask over the D channels; 2ND operations",
    "self": "D/h × D/h numbers a head; 2ND²/h operations",
}
CHANNELS, TOKENS, CELL = 5, 8, 0.095
TALL, BROAD = CHANNELS * CELL, TOKENS * CELL
RATES = {"token": (0.18, 0.5), "channel": (0.06, 0.5), "self": (0.55, 0.6, 0.6)}  # of q, k, v: some pass, some do not


def box(axis: Axes, x: float, y: float, width: float, height: float, text: str = "", **look) -> None:
    """A rounded box with its lower left corner at x, y and a text in the middle; `size` and `color` are the text's."""
    font = {"fontsize": look.pop("size", 9), "color": look.pop("color", INK), "weight": look.pop("weight", "normal")}
    shape = f"round,pad=0,rounding_size={min(0.07, height / 2)}"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **{"lw": 0.9, "fc": "white"} | look))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center_baseline", **font)


def arrow(axis: Axes, *points: tuple[float, float], color: str = INK) -> None:
    """A line through all points, with a head at the last."""
    axis.plot(*zip(*points[:-1], strict=True), color=color, lw=1, solid_capstyle="butt")
    look = {"arrowstyle": "-|>", "color": color, "lw": 1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
    axis.annotate("", points[-1], points[-2], arrowprops=look)


def joint(axis: Axes, x: float, y: float, sign: str = "+", radius: float = 0.075) -> None:
    """A circle in which two paths meet: "+" for their sum, "·" for their product."""
    axis.add_patch(Circle((x, y), radius, fc="white", ec=INK, lw=1, zorder=3))
    if sign == "+":
        for line in ([(x - radius, y), (x + radius, y)], [(x, y - radius), (x, y + radius)]):
            axis.plot(*zip(*line, strict=True), color=INK, lw=1, zorder=4)
    else:
        axis.add_patch(Circle((x, y), radius / 3, fc=INK, lw=0, zorder=4))


def cells(axis: Axes, values: Tensor, x: float, y: float, cell: float, colour: str) -> None:
    """A matrix [rows,columns] as a grid whose lower left corner is at x, y: from white for 0 to `colour`."""
    rows, columns = values.shape
    shades = LinearSegmentedColormap.from_list(colour, ["white", colour])
    right, top = x + columns * cell, y + rows * cell
    extent = (x, right, y, top)
    look = {"cmap": shades, "vmin": 0, "vmax": max(1, values.max().item())}
    axis.imshow(values.numpy(), **look, extent=extent, interpolation="none", zorder=2)
    lines = [[(x, y + i * cell), (right, y + i * cell)] for i in range(rows + 1)]
    lines += [[(x + i * cell, y), (x + i * cell, top)] for i in range(columns + 1)]
    axis.add_collection(LineCollection(lines, color=INK, lw=min(0.5, 6 * cell), alpha=0.55, zorder=2.5))


def _computed(kind: str) -> dict[str, Tensor]:
    """Spikes of one head [channels,tokens], and what stands between: mask, or the product "kv"."""
    attention = ATTENTIONS[kind](CHANNELS, heads=1)
    rng = torch.Generator().manual_seed(5)
    inputs = [(torch.rand(1, 1, 1, CHANNELS, TOKENS, generator=rng) < rate).float() for rate in RATES[kind]]
    seen = {}
    attention.attn_lif.register_forward_hook(lambda *call: seen.update(mask=call[2][0, 0, 0]))
    seen["y"] = attention.attend(*inputs)[0, 0, 0]
    seen |= {name: x[0, 0, 0] for name, x in zip("qkv", inputs, strict=False)}
    return seen | ({"kv": seen["v"] @ seen["k"].mT} if "v" in seen else {})


def draw_attention(
    axis: Axes, kind: str, x: float, y: float, width: float, height: float, stages: Sequence[int], scale: float | None
) -> None:
    """A panel: name, where the network has it (`stages`; `scale` is its own), the schematic, formula and cost."""
    colour, seen = COLOURS[kind], _computed(kind)
    box(axis, x, y, width, height, ec=colour, lw=1.2)
    box(axis, x, y + height - 0.3, width, 0.3, ec=colour, fc=colour)
    where = f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}" if stages else "not in this network"
    middle = y + height - 0.15
    axis.text(x + 0.12, middle, NAMES[kind], color="white", weight="bold", fontsize=10.5, va="center_baseline")
    axis.text(x + width - 0.12, middle, where, color="white", fontsize=9.5, va="center_baseline", ha="right")
    left, top = x + (width - 3.5) / 2 + 0.1, y + height - 0.62 - TALL
    (_draw_product if kind == "self" else _draw_mask)(axis, kind, seen, left, top)
    formula = FORMULAS[kind] % (SSA_SCALE if scale is None else scale) if kind == "self" else FORMULAS[kind]
    axis.text(x + width / 2, y + 0.37, formula, ha="center", va="center_baseline", fontsize=10.5)
    axis.text(x + width / 2, y + 0.14, COSTS[kind], ha="center", va="center_baseline", fontsize=9)


def _matrix(axis: Axes, seen: dict[str, Tensor], name: str, x: float, y: float, colour: str, title: str = "") -> None:
    values = seen[name]
    cells(axis, values, x, y, CELL, colour)
    middle, top = x + values.shape[1] * CELL / 2, y + len(values) * CELL + 0.05
    axis.text(middle, top, title or f"${name}$", ha="center", fontsize=10)


def _draw_mask(axis: Axes, kind: str, seen: dict[str, Tensor], x: float, y: float) -> None:
    """Q-K attention, the lower left corner of q at x, y."""
    colour, k, y_out, low = COLOURS[kind], x + 1.42, x + 2.63, y - 0.5
    _matrix(axis, seen, "q", x, y, colour)
    _matrix(axis, seen, "k", k, y, colour)
    _matrix(axis, seen, "y", y_out, y, colour)
    axis.text(x - 0.05, y + TALL / 2, "channels", rotation=90, ha="right", va="center", fontsize=8.5)
    axis.text(y_out + BROAD / 2, y - 0.06, "tokens", ha="center", va="top", fontsize=8.5)
    meet = k + BROAD + 0.205, y + TALL / 2
    if kind == "token":
        cells(axis, seen["mask"], x, low, CELL, INK)
        arrow(axis, (x + BROAD / 2, y), (x + BROAD / 2, low + CELL))
        axis.text(x + BROAD / 2 + 0.08, y - 0.2, "Σ channels, LIF", va="center_baseline", fontsize=9)
        arrow(axis, (x + BROAD, low + CELL / 2), (meet[0], low + CELL / 2), (meet[0], meet[1] - 0.075))
    else:
        mask = x + BROAD + 0.3
        cells(axis, seen["mask"], mask, y, CELL, INK)
        arrow(axis, (x + BROAD, meet[1]), (mask, meet[1]))
        axis.text(x + BROAD / 2 + 0.1, y - 0.2, "Σ tokens, LIF", ha="center", va="center_baseline", fontsize=9)
        bottom = low + CELL / 2
        arrow(axis, (mask + CELL / 2, y), (mask + CELL / 2, bottom), (meet[0], bottom), (meet[0], meet[1] - 0.075))
    axis.text(meet[0] - 0.1, low + CELL / 2 + 0.05, "mask", ha="right", fontsize=9)
    arrow(axis, (k + BROAD, meet[1]), (meet[0] - 0.075, meet[1]))
    arrow(axis, (meet[0] + 0.075, meet[1]), (y_out, meet[1]))
    joint(axis, *meet, "·")


def _draw_product(axis: Axes, kind: str, seen: dict[str, Tensor], x: float, y: float) -> None:
    """Self-attention, the lower left corner of k at x, y."""
    colour, below = COLOURS[kind], y - TALL - 0.28
    half = (y + TALL + below) / 2
    kv, q, y_out = x + 0.96, x + 1.56, x + 2.62
    _matrix(axis, seen, "k", x, y, colour)
    _matrix(axis, seen, "v", x, below, colour)
    _matrix(axis, seen, "kv", kv, half - TALL / 2, INK, r"$v k^\mathsf{T}$")
    _matrix(axis, seen, "q", q, half - TALL / 2, colour)
    _matrix(axis, seen, "y", y_out, half - TALL / 2, colour)
    axis.text(x - 0.05, y + TALL / 2, "channels", rotation=90, ha="right", va="center", fontsize=8.5)
    axis.text(y_out + BROAD / 2, half - TALL / 2 - 0.06, "tokens", ha="center", va="top", fontsize=8.5)
    turn = x + BROAD + 0.1
    axis.plot([x + BROAD, turn, turn, x + BROAD], [y + TALL / 2] * 2 + [below + TALL / 2] * 2, color=INK, lw=1)
    arrow(axis, (turn, half), (kv, half))
    axis.text((kv + TALL + q) / 2, half, "×", ha="center", va="center_baseline", fontsize=10)
    arrow(axis, (q + BROAD, half), (y_out, half))
    axis.text((q + BROAD + y_out) / 2, half + 0.06, "LIF", ha="center", fontsize=9)


def landscape(axis: Axes, x: float, y: float, side: float) -> None:
    """An image: hills under a sun."""
    sky, frame = (
        Rectangle((x, y), side, side, fc="#d9ecf7", ec="none"),
        Rectangle((x, y), side, side, fill=False, lw=0.9),
    )
    hills = [[(0, 0), (0, 0.25), (0.35, 0.62), (0.8, 0)], [(0.35, 0), (0.75, 0.45), (1, 0.2), (1, 0)]]
    axis.add_patch(sky)
    axis.add_patch(Circle((x + 0.74 * side, y + 0.77 * side), 0.1 * side, fc="#f2b632", lw=0))
    for hill, colour in zip(hills, ("#6f9f6a", "#4d7d5b"), strict=True):
        axis.add_patch(Polygon([(x + a * side, y + b * side) for a, b in hill], fc=colour, lw=0))
    axis.add_patch(frame)


def events(axis: Axes, x: float, y: float, side: float) -> None:
    """An event frame: the edges of a moving disk, ON red and OFF blue."""
    rng = torch.Generator().manual_seed(0)
    angle = 2 * torch.pi * torch.rand(240, generator=rng)
    radius = side * (0.3 + 0.03 * torch.randn(240, generator=rng))
    for is_on, colour in ((angle.cos() > 0.15, "tab:red"), (angle.cos() < -0.15, "tab:blue")):
        at = x + side / 2 + (radius * angle.cos())[is_on], y + side / 2 + (radius * angle.sin())[is_on]
        axis.plot(*at, ".", color=colour, markersize=1.6)
