"""The figure of an architecture: pyramid, stages and attentions. All coordinates are inches."""

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from torch import Tensor, nn

from models import HierarchicalSpikingTransformer
from models.qkformer import ATTENTIONS

from .common import COLOURS
from .schematics import INK, NAMES, arrow, box, cells, draw_attention, events, joint, landscape
from .stages import Stage, describe, parameters

WIDTH, SIDE, CARD = 12.0, 1.65, 2.6  # inches, as all coordinates: the figure, its outer columns, the card of a stage
EMBED = "#6b6b6b"
ROW, GAP = 0.26, 0.13  # height of a unit, and the space before it
FACE, DEEP = 1.7, (0.62, 0.34)  # side of the largest token grid; where the edge of the most channels leads
CARDS, BLOCKS = 2.85, 1.9  # lower edge of the cards, and height of the part that is repeated


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


class Drawing:
    """The figure of one network; `x` is its input, on the meta device as the network."""

    def __init__(self, name: str, model: HierarchicalSpikingTransformer, x: Tensor):
        self.name, self.model, self.x = name, model, x
        self.stages = describe(model, x)
        self.card_top = CARDS + BLOCKS + max(len(stage.units) for stage in self.stages) * (ROW + GAP) + 0.88
        self.height = self.card_top + 3.2
        self.figure = Figure(figsize=(WIDTH, self.height), facecolor="white")
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.axis("off")
        room = (WIDTH - 2 * SIDE) / len(self.stages)
        middles = [SIDE + room * (i + 0.5) for i in range(len(self.stages))]
        self.level = self.card_top + 1.6  # of the arrows through the pyramid
        self._title()
        right = self._input()
        for i, (stage, middle) in enumerate(zip(self.stages, middles, strict=True), 1):
            left, end = self._pyramid(stage, middle)
            arrow(self.axis, (right + 0.08, self.level), (left - 0.08, self.level))
            self._card(i, stage, middle)
            right = end
        self._head(right)
        self._key()
        self._attentions()
        self.axis.set(xlim=(0, WIDTH), ylim=(0, self.height), aspect="auto")

    def _text(self, x: float, y: float, text: str, size: float = 9, **look) -> None:
        self.axis.text(x, y, text, fontsize=size, **{"ha": "center", "va": "center_baseline"} | look)

    def _title(self) -> None:
        model = self.model
        added = "spikes (SEW)" if model.residual == "sew" else "membrane currents (MS)"
        facts = f"{_millions(parameters(model))} parameters,  residuals add {added}"
        self._text(0.25, self.height - 0.33, self.name, 17, ha="left", weight="bold")
        self._text(WIDTH - 0.25, self.height - 0.33, facts, 11, ha="right")

    def _input(self) -> float:
        """The input's frames; returns where they end."""
        is_events, side, step = self.x.dim() == 5, 0.85, 0.07
        steps = self.x.shape[1] if is_events else self.model.time_steps
        x, y, shown = 0.25, self.level - side / 2 - 0.1, min(steps, 4)
        for i in reversed(range(shown)):
            corner = x + i * step, y + i * step
            self.axis.add_patch(Rectangle(corner, side, side, fc="white", ec=INK, lw=0.9))
        (events if is_events else landscape)(self.axis, x, y, side)
        sizes = " × ".join(map(str, self.x.shape[-3:]))
        lines = [f"{steps} event frames" if is_events else "image", sizes]
        lines += [] if is_events else [f"shown T = {steps} time" + "s" * (steps > 1)]
        for i, line in enumerate(lines):
            self._text(x + side / 2 + 0.1, y - 0.2 - 0.19 * i, line, 9.5)
        return x + side + (shown - 1) * step

    def _pyramid(self, stage: Stage, middle: float) -> tuple[float, float]:
        """Tokens as a face, channels as its depth; returns where it begins and ends."""
        cell = FACE / max(max(other.grid) for other in self.stages)
        share = stage.channels / max(other.channels for other in self.stages)
        height, width = (n * cell for n in stage.grid)
        dx, dy = (share * part for part in DEEP)
        x, y = middle - (width + dx) / 2, self.level - (height + dy) / 2
        colour = COLOURS[stage.kind]
        corners = [(x, y + height), (x + dx, y + height + dy), (x + width + dx, y + height + dy)]
        corners += [(x + width + dx, y + dy), (x + width, y), (x + width, y + height)]
        for part, paler in ((corners[:3] + corners[5:], 0.75), (corners[2:], 0.55)):
            face = [paler + (1 - paler) * value for value in to_rgb(colour)]
            self.axis.add_patch(Polygon(part, fc=face, ec=INK, lw=0.8, joinstyle="round"))
        rng = torch.Generator().manual_seed(stage.channels)
        cells(self.axis, (torch.rand(stage.grid, generator=rng) < 0.2).float(), x, y, cell, colour)
        rows, columns = stage.grid
        self._text(middle, self.card_top + 0.34, f"{rows} × {columns} tokens", 11, weight="bold")
        self._text(middle, self.card_top + 0.13, f"{stage.channels} channels", 10)
        return x, x + width + dx

    def _card(self, number: int, stage: Stage, middle: float) -> None:
        """What a stage computes, from the top down."""
        x, bottom, colour = middle - CARD / 2, CARDS, COLOURS[stage.kind]
        box(self.axis, x, bottom, CARD, self.card_top - bottom, fc="#fafafa", ec="#bbbbbb")
        top = self.card_top - 0.17
        self._text(x + 0.12, top, f"stage {number}", 10.5, ha="left", weight="bold")
        self._text(x + CARD - 0.12, top, f"{_millions(stage.parameters)} parameters", 9, ha="right")
        end = self._chain(stage, x + 0.12, top - 0.2)
        blocks = bottom + BLOCKS
        path, right = x + 1.05, x + CARD - 0.35
        arrow(self.axis, (path, end), (path, blocks - 0.02))
        look = {"fc": "none", "ec": colour, "ls": (0, (4, 2))}
        box(self.axis, x + 0.06, bottom + 0.08, CARD - 0.12, blocks - bottom - 0.1, **look)
        self._text(x + 0.15, blocks - 0.17, f"{stage.depth} block" + "s" * (stage.depth > 1), 9.5, ha="left")
        channels, hidden = stage.mlp
        parts = [
            (f"{NAMES[stage.kind]}\n{stage.heads} heads of {channels // stage.heads} channels", colour, "white", 0.42),
            (f"MLP {channels} → {hidden} → {channels}", "white", INK, ROW),
        ]
        y = blocks - 0.02
        for text, fill, ink, height in parts:
            start, y = y - 0.1, y - 0.29 - height
            arrow(self.axis, (path, start + 0.1), (path, y + height))
            box(self.axis, x + 0.12, y, 1.86, height, text, fc=fill, ec=colour, color=ink, size=9)
            arrow(self.axis, (path, start), (right, start), (right, y - 0.13), (path + 0.075, y - 0.13))
            self.axis.plot([path] * 2, [y, y - 0.13], color=INK, lw=1)
            joint(self.axis, path, y - 0.13)
            y -= 0.2
        arrow(self.axis, (path, y), (path, bottom - 0.02))

    def _chain(self, stage: Stage, x: float, top: float) -> float:
        """The patch embedding with its shortcut; returns where it ends."""
        path, right = x + 0.93, x + CARD - 0.47
        self._text(x, top - 0.02, stage.embed, 9.5, ha="left", weight="bold")
        arrow(self.axis, (path, top + 0.1), (path, top - GAP))
        y = top - GAP
        for i, unit in enumerate(stage.units):
            if i == stage.branch and stage.shortcut:
                start = y + GAP / 2
            y -= ROW
            box(self.axis, x, y, 1.86, ROW, unit, ec=EMBED)
            y -= GAP
            if i + 1 < len(stage.units):
                arrow(self.axis, (path, y + GAP), (path, y))
        if not stage.shortcut:
            return y + GAP
        self.axis.plot([path] * 2, [y + GAP, y], color=INK, lw=1)
        arrow(self.axis, (path, start), (right, start), (right, y - 0.03), (path + 0.075, y - 0.03))
        look = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 8.5, "linespacing": 1.1}
        self.axis.text(right + 0.17, (start + y) / 2, stage.shortcut.replace(" · ", "\n"), **look)
        joint(self.axis, path, y - 0.03)
        return y - 0.1

    def _head(self, right: float) -> None:
        """What makes logits of the last stage."""
        rows = ["mean over tokens", "mean over T", f"linear → {self.model.head.out_features}"]
        if not isinstance(self.model.lif, nn.Identity):
            rows.insert(1, "LIF")
        x, width, step = WIDTH - SIDE + 0.15, SIDE - 0.35, ROW + GAP
        y = self.level + (len(rows) * step - GAP) / 2
        arrow(self.axis, (right + 0.08, self.level), (x - 0.02, self.level))
        for i, row in enumerate(rows):
            box(self.axis, x, y - ROW, width, ROW, row, ec=EMBED)
            if i + 1 < len(rows):
                arrow(self.axis, (x + width / 2, y - ROW), (x + width / 2, y - step))
            y -= step
        self._text(x + width / 2, y - 0.05, f"{_millions(parameters(self.model.head))} parameters")

    def _key(self) -> None:
        """What the cards' words stand for, at both sides of them."""
        added = ["spikes"] if self.model.residual == "sew" else ["currents;", "branches start", "with a LIF"]
        left = {"n×n → C": ["convolution to C", "channels, BatchNorm"], "↓2": ["stride 2"]}
        left |= {"pool": ["maximum of 3×3,", "stride 2"]}
        right = {"LIF": ["spiking neurons"], "MLP": ["two 1×1 units"], "⊕": ["sum of " + added[0], *added[1:]]}
        for x, key in ((0.2, left), (WIDTH - SIDE + 0.15, right)):
            y = self.card_top - 0.17
            for word, lines in key.items():
                self._text(x, y, word, 9, ha="left", weight="bold")
                for line in lines:
                    y -= 0.18
                    self._text(x, y, line, 9, ha="left")
                y -= 0.3

    def _attentions(self) -> None:
        width = (WIDTH - 0.4 - 0.3) / len(ATTENTIONS)
        for i, kind in enumerate(ATTENTIONS):
            used = [number for number, stage in enumerate(self.stages, 1) if stage.kind == kind]
            scale = self.stages[used[0] - 1].scale if used else None
            draw_attention(self.axis, kind, 0.2 + i * (width + 0.15), 0.2, width, 2.4, used, scale)
