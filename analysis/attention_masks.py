"""Tokens or channels that pass Q-K attention, drawn over the input (attention_masks.png).

    python -m analysis.attention_masks --checkpoint output/first/best.pt

A column is a block, with the share of tokens or channels that pass. Token attention shows the share of heads and
time steps in which a token passes. Channel attention shows the share of channels and time steps in which a token's key
passes. The strip shows how often each channel is open.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.cli import UserError
from engine.log import logger
from models.attention import ChannelQKAttention, TokenQKAttention

from .common import Subject, drawing, hooked, main, positive, subjects


class Mask(NamedTuple):
    """Mask of one block with Q-K attention."""

    block: str
    kind: str  # "token" or "channel"
    over_image: Tensor  # [B,H,W], 0 to 1
    of_channels: Tensor | None  # [B,C], how often each is open, of channel attention
    passing: Tensor  # [B], share of tokens or channels that pass


@torch.inference_mode()
def measure(subject: Subject, images: Tensor) -> list[Mask]:
    """Return the masks for `images` [B,...], block by block; raise `UserError` if the network has none."""
    masks, spikes, callbacks = [], {}, {}

    def keep(block: str, attention: TokenQKAttention | ChannelQKAttention, x: Tensor, _) -> None:
        passed = spikes["passed"].unflatten(2, (attention.heads, -1))  # [T,B,h,d,N]
        masks.append(_mask(block, type(attention), spikes["mask"], passed, x.shape[3:]))

    for name, module in subject.model.named_modules():
        if isinstance(module, TokenQKAttention | ChannelQKAttention):
            callbacks[module.attn_lif] = lambda _, mask: spikes.update(mask=mask)
            callbacks[module.proj] = lambda passed, _: spikes.update(passed=passed)
            callbacks[module] = functools.partial(keep, name.removesuffix(".attn"), module)
    if not callbacks:
        raise UserError(f"{subject.path}: {subject.cfg.model} without Q-K attention; use another checkpoint")
    with hooked(callbacks):
        subject.model(images)
    return masks


def _mask(block: str, kind: type, mask: Tensor, passed: Tensor, grid: tuple[int, int]) -> Mask:
    """Average spikes [T,B,h,1,N] or [T,B,h,d,1] and the keys that passed [T,B,h,d,N]."""
    open_share = mask.float().mean(0)  # [B,h,1,N] or [B,h,d,1]
    passing = open_share.flatten(1).mean(1)
    if kind is TokenQKAttention:
        return Mask(block, "token", open_share.mean((1, 2)).unflatten(1, grid), None, passing)
    tokens = passed.float().mean((0, 2, 3))  # [B,N]
    return Mask(block, "channel", tokens.unflatten(1, grid), open_share.flatten(1), passing)


def draw(subject: Subject, images: Tensor, labels: Tensor, masks: list[Mask], path: Path) -> None:
    """Draw a row for each sample: the input, then the input under each block's mask."""
    columns = len(masks) + 1
    brightest = {mask.block: mask.over_image.max().item() or 1.0 for mask in masks}
    with drawing(path, len(images), columns, (1.7 * columns, 1.75 * len(images) + 0.6)) as (figure, axes):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            picture = subject.data.show(image.float().cpu()).numpy()  # [H,W,C]
            first, *others = axes[i * columns : (i + 1) * columns]
            first.imshow(picture, cmap="gray", vmin=0, vmax=1)
            first.set_ylabel(subject.data.classes[label], fontsize=9)
            for axis, mask in zip(others, masks, strict=True):
                heat = F.interpolate(mask.over_image[i][None, None].cpu(), picture.shape[:2], mode="nearest")[0, 0]
                axis.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=1)
                axis.imshow(heat.numpy(), cmap="inferno", alpha=0.65, vmin=0, vmax=brightest[mask.block])
                axis.set_xlabel(f"{mask.passing[i]:.1%} pass", fontsize=8)
                if mask.kind == "channel":
                    strip = axis.inset_axes((0, -0.02, 1, 0.14))
                    strip.imshow(mask.of_channels[i][None].cpu().numpy(), cmap="viridis", aspect="auto", vmin=0, vmax=1)
                    strip.set(xticks=[], yticks=[])
        axes[0].set_title("input", fontsize=9)
        for axis, mask in zip(axes[1:], masks, strict=False):
            _, stage, _, number = mask.block.split(".")
            height, width = mask.over_image.shape[1:]
            title = f"stage {int(stage) + 1}, block {int(number) + 1}\n{mask.kind}, {height}x{width}"
            axis.set_title(title, fontsize=9)
        for axis in axes:
            axis.set(xticks=[], yticks=[])
        below = "\nstrips: how often each channel is open" if any(mask.kind == "channel" for mask in masks) else ""
        figure.suptitle(f"Passing tokens are bright, scaled by column{below}", fontsize=10)


def run(argv: Sequence[str]) -> None:
    samples = {"type": positive, "default": 8, "help": "test samples to draw (8)"}
    args, loaded = subjects(__doc__, argv, samples=samples)
    for subject in loaded:
        name = f"attention_masks-{subject.name}" if len(loaded) > 1 else "attention_masks"
        images, labels = subject.samples(args.samples)
        masks = measure(subject, images)
        draw(subject, images, labels, masks, args.output_dir / f"{name}.png")
        for mask in masks:
            logger.info(f"{mask.block}: {mask.passing.mean():.1%} of the {mask.kind}s pass")
        logger.info(f"written: {args.output_dir / name}.png")


if __name__ == "__main__":
    main(run)
