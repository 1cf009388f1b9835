"""Pictures of samples as a network sees them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from ..log import label

SUFFIXES = (".png", ".jpg", ".pdf", ".svg")  # formats of pictures


def of_image(mean: Sequence[float], std: Sequence[float], image: Tensor) -> Tensor:
    """Return a normalised image [C,H,W] as [H,W,C], 0 to 1."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (image * std + mean).permute(1, 2, 0).clamp(0, 1)


def of_events(frames: Tensor) -> Tensor:
    """Return the middle one of event frames [T,2,H,W] as [H,W,3], 0 to 1."""
    return _of_frame(frames[len(frames) // 2])


def _of_frame(frame: Tensor) -> Tensor:
    """Return [2,H,W] as [H,W,3]: ON events red, OFF events blue, on white."""
    off, on = frame.float()  # each [H,W]
    strength = on + off
    busy = strength[strength > 0]
    full = busy.quantile(0.9) if len(busy) else 1  # more events than this get the full colour
    on, off = on / full, off / full
    return 1 - torch.stack([off, on + off, on], 2).clamp(0, 1)


def gallery(samples: Sequence[tuple[Tensor, str, str]], path: Path, title: str, columns: int = 10) -> None:
    """Draw images [H,W,C], each with a caption and the colour of the caption."""
    rows = max(1, -(-len(samples) // columns))
    figure = Figure(figsize=(11, 1.5 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    longest = max((len(line) for _, caption, _ in samples for line in caption.splitlines()), default=1)
    for axis in axes:
        axis.axis("off")
    for axis, (image, caption, color) in zip(figure.axes, samples, strict=False):
        axis.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_title(caption, fontsize=min(8, 125 / longest), color=color)  # fits the column
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def frames(samples: Sequence[Tensor], names: Sequence[str], path: Path, most: int = 16) -> None:
    """Draw event frames [T,2,H,W], one sample per row, up to `most` frames each."""
    columns = min(len(samples[0]), most)
    images = [_of_frame(frame).permute(2, 0, 1) for sample in samples for frame in sample[:columns]]
    grid = make_grid(images, nrow=columns, padding=1, pad_value=0.5)  # [3,rows*(H+1)+1,columns*(W+1)+1]
    figure = Figure(figsize=(0.9 * columns + 1.2, 0.9 * len(samples) + 0.8), layout="constrained")
    axis = figure.subplots()
    axis.imshow(grid.permute(1, 2, 0).numpy())
    height, width = (side + 1 for side in images[0].shape[1:])
    axis.set_yticks([height * (i + 0.5) for i in range(len(names))], [label(name, 30) for name in names])
    axis.set_xticks([width * (t + 0.5) for t in range(columns)], [f"t = {t}" for t in range(columns)])
    axis.tick_params(length=0, labelsize=9)
    figure.suptitle("Event frames of training samples: ON events red, OFF events blue", fontsize=11)
    figure.savefig(path, dpi=110)
