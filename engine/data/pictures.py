"""Pictures of a network's inputs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..cli import UserError

SUFFIXES = (".png", ".jpg", ".pdf", ".svg")  # formats of pictures


def require_format(flag: str, path: Path) -> None:
    """Raise `UserError` if the `path` of a flag has no suffix of a picture."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{flag} {path}: unknown format; use {', '.join(SUFFIXES)}")


def of_image(mean: Sequence[float], std: Sequence[float], image: Tensor) -> Tensor:
    """Return a normalised image [C,H,W] as [H,W,C], 0 to 1."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (image * std + mean).permute(1, 2, 0).clamp(0, 1)


def of_events(frames: Tensor) -> Tensor:
    """Return the middle one of event frames [T,2,H,W] as [H,W,3], 0 to 1: ON red, OFF blue, on white."""
    off, on = frames[len(frames) // 2].float()  # each [H,W]
    strength = on + off
    busy = strength[strength > 0]
    full = busy.quantile(0.9) if len(busy) else 1  # from this number of events on the full colour
    on, off = on / full, off / full
    return 1 - torch.stack([off, on + off, on], 2).clamp(0, 1)


def row(frames: Tensor, caption: str, count: int) -> list[tuple[Tensor, str]]:
    """Return `count` of the event frames [T,2,H,W], evenly spaced, for `gallery`; the first has the caption."""
    steps = [i * len(frames) // count for i in range(count)]
    return [(of_events(frames[t : t + 1]), f"t = {t}" if t else caption) for t in steps]


def gallery(samples: Sequence[tuple[Tensor, str]], path: Path, title: str, columns: int = 10) -> None:
    """Draw images [H,W,C], each with a caption."""
    rows = max(1, -(-len(samples) // columns))
    figure = Figure(figsize=(11, 1.5 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    longest = max((len(line) for _, caption in samples for line in caption.splitlines()), default=1)
    for axis in axes:
        axis.axis("off")
    for axis, (image, caption) in zip(figure.axes, samples, strict=False):
        axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(caption, fontsize=min(8, 125 / longest))  # fits the column
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
