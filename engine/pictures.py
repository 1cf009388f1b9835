"""Pictures of a run: the learning curve, samples with the model's answers, and event frames."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid


def learning_curve(history: list[dict], path: Path) -> None:
    """Losses, accuracy and learning rate against the epoch."""
    epochs = [row["epoch"] + 1 for row in history]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].plot(epochs, [row["train_loss"] for row in history], marker=".", label="training")
    axes[0].plot(epochs, [row["test_loss"] for row in history], marker=".", label="test")
    axes[0].set(ylabel="loss", ylim=(0, None))
    axes[0].legend()
    top1 = [row["test_top1"] for row in history]
    best = max(range(len(top1)), key=top1.__getitem__)
    axes[1].plot(epochs, top1, marker=".", color="tab:orange")
    label = f"best: {top1[best]:.2f} % (epoch {epochs[best]})"
    axes[1].plot(epochs[best], top1[best], "o", color="tab:red", label=label)
    axes[1].set(ylabel="test top-1 accuracy (%)")
    axes[1].legend(loc="lower right")
    axes[2].plot(epochs, [row["lr"] for row in history], marker=".", color="tab:green")
    axes[2].set(ylabel="learning rate", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


class Gallery:
    """Test samples with the model's answers: the first mistakes, then right answers, `rows` x `columns` in all."""

    rows, columns = 4, 10

    def __init__(self, classes: Sequence[str], show: Callable[[Tensor], Tensor]):
        """`show` makes [H,W,3] or [H,W,1], 0 to 1, of a sample as the network sees it."""
        self.classes, self.show = classes, show
        self.wrong, self.right = [], []

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Take what is still needed of a batch: samples [B,...] as the network sees them, logits [B,classes]."""
        size = self.rows * self.columns
        answers = logits.argmax(1)
        for kept, chosen, limit in ((self.wrong, answers != labels, size // 2), (self.right, answers == labels, size)):
            for i in chosen.nonzero()[: limit - len(kept), 0].tolist():
                kept.append((images[i].float().cpu(), labels[i].item(), answers[i].item()))

    def draw(self, path: Path) -> None:
        """Write the picture; mistakes come first, in red, with the truth."""
        figure = Figure(figsize=(11, 1.5 * self.rows), layout="constrained")
        axes = figure.subplots(self.rows, self.columns)
        for axis in axes.flat:
            axis.axis("off")
        for axis, (image, label, answer) in zip(axes.flat, self.wrong + self.right, strict=False):
            axis.imshow(self.show(image).numpy(), cmap="gray", vmin=0, vmax=1)
            said, true = (_short(self.classes[index]) for index in (answer, label))
            if label == answer:
                axis.set_title(said, fontsize=8)
            else:
                axis.set_title(f"{said}\nis {true}", fontsize=8, color="tab:red")
        figure.suptitle("Test samples with the model's answers; mistakes first, in red", fontsize=11)
        figure.savefig(path, dpi=110)


def _short(name: str, most: int = 15) -> str:
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return name.replace("$", r"\$")  # it is no formula


def of_image(mean: Sequence[float], std: Sequence[float], image: Tensor) -> Tensor:
    """[C,H,W], normalised, as [H,W,C] to look at."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (image * std + mean).permute(1, 2, 0).clamp(0, 1)


def of_events(frames: Tensor) -> Tensor:
    """The middle one of event frames [T,2,H,W] as [H,W,3] to look at."""
    return _of_frame(frames[len(frames) // 2])


def _of_frame(frame: Tensor) -> Tensor:
    """[2,H,W] as [H,W,3]: ON events red, OFF events blue, on white."""
    off, on = frame.float()  # each [H,W]
    strength = on + off
    busy = strength[strength > 0]
    full = busy.quantile(0.9) if len(busy) else 1  # from here on the colour is full
    on, off = on / full, off / full
    return 1 - torch.stack([off, on + off, on], 2).clamp(0, 1)


def frames(samples: Sequence[Tensor], names: Sequence[str], path: Path, most: int = 16) -> None:
    """Draw event frames [T,2,H,W], a row a sample, up to `most` frames a row."""
    columns = min(len(samples[0]), most)
    images = [_of_frame(frame).permute(2, 0, 1) for sample in samples for frame in sample[:columns]]
    grid = make_grid(images, nrow=columns, padding=1, pad_value=0.5)  # [3,rows*(H+1)+1,columns*(W+1)+1]
    figure = Figure(figsize=(0.9 * columns + 1.2, 0.9 * len(samples) + 0.8), layout="constrained")
    axis = figure.subplots()
    axis.imshow(grid.permute(1, 2, 0).numpy())
    height, width = (side + 1 for side in images[0].shape[1:])
    axis.set_yticks([height * (i + 0.5) for i in range(len(names))], [_short(name, 30) for name in names])
    axis.set_xticks([width * (t + 0.5) for t in range(columns)], [f"t = {t}" for t in range(columns)])
    axis.tick_params(length=0, labelsize=9)
    figure.suptitle("Event frames of training samples: ON events red, OFF events blue", fontsize=11)
    figure.savefig(path, dpi=110)
