"""What Q-K attention lets pass, drawn over the input: the masks of its tokens, and of its channels.

    python -m analysis.attention_masks --checkpoint output/first/best.pt

Token attention: the share of heads and time steps in which a token passes. Channel attention: the share of channels and
time steps in which a token holds a spike of the key that passes; the bars below show how often each channel is open.
A column per block, with the share of all tokens or channels that pass. Writes attention_masks.png, and a CSV with the
masks of every sample drawn.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from engine.cli import UserError
from engine.log import logger
from models.attention import ChannelQKAttention, TokenQKAttention

from .common import Subject, checkpoint_parser, main, positive, short_names, subjects, write_csv


class Mask(NamedTuple):
    """Of one block with Q-K attention."""

    block: str
    kind: str  # "token" or "channel"
    over_image: Tensor  # [B,H,W], 0 to 1
    of_channels: Tensor | None  # [B,C], how often each is open, of channel attention
    passing: Tensor  # [B], the share of tokens or channels that pass


@torch.inference_mode()
def measure(subject: Subject, images: Tensor) -> list[Mask]:
    """The masks for `images` [B,...], block by block.

    Raises:
        UserError: the network has self-attention alone, which masks nothing.
    """
    masks, grids, attentions = [], {}, {}
    for name, module in subject.model.named_modules():
        if isinstance(module, TokenQKAttention | ChannelQKAttention):
            attentions[name.removesuffix(".attn")] = module

    def attend(name: str, module, own, q: Tensor, k: Tensor) -> Tensor:
        spikes = {}
        handle = module.attn_lif.register_forward_hook(lambda *call: spikes.update(mask=call[2]))
        passed = own(q, k)  # [T,B,h,d,N]
        handle.remove()
        masks.append(_mask(name, type(module), spikes["mask"], passed, grids[name]))
        return passed

    if not attentions:
        raise UserError(f"{subject.path}: this {subject.cfg.model} has self-attention alone, which masks nothing")
    handles = []
    for name, module in attentions.items():
        grid = functools.partial(lambda name, *call: grids.update({name: call[1][0].shape[3:]}), name)
        handles.append(module.register_forward_pre_hook(grid))
        module.attend = functools.partial(attend, name, module, module.attend)
    subject.model(images)
    for module, handle in zip(attentions.values(), handles, strict=True):
        handle.remove()
        del module.attend
    return masks


def _mask(block: str, kind: type, mask: Tensor, passed: Tensor, grid: tuple[int, int]) -> Mask:
    """From spikes [T,B,h,1,N] or [T,B,h,d,1] and the keys that passed [T,B,h,d,N]."""
    open_share = mask.float().mean(0)  # [B,h,1,N] or [B,h,d,1]
    passing = open_share.flatten(1).mean(1)
    if kind is TokenQKAttention:
        return Mask(block, "token", open_share.mean((1, 2)).unflatten(1, grid), None, passing)
    tokens = passed.float().mean((0, 2, 3))  # [B,N]
    return Mask(block, "channel", tokens.unflatten(1, grid), open_share.flatten(1), passing)


def draw(subject: Subject, images: Tensor, labels: Tensor, masks: list[Mask], path: Path) -> None:
    """A row for each sample: the input, then the input under each block's mask."""
    figure = Figure(figsize=(1.7 * (len(masks) + 1), 1.75 * len(images) + 0.6), layout="constrained")
    axes = figure.subplots(len(images), len(masks) + 1, squeeze=False)
    brightest = {mask.block: mask.over_image.max().item() or 1.0 for mask in masks}
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        picture = subject.data.show(image.float().cpu()).numpy()  # [H,W,C]
        axes[i, 0].imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes[i, 0].set_ylabel(subject.data.classes[label], fontsize=9)
        for axis, mask in zip(axes[i, 1:], masks, strict=True):
            heat = F.interpolate(mask.over_image[i][None, None].cpu(), picture.shape[:2], mode="nearest")[0, 0].numpy()
            axis.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=1)
            axis.imshow(heat, cmap="inferno", alpha=0.65, vmin=0, vmax=brightest[mask.block])
            axis.set_xlabel(f"{mask.passing[i]:.1%} pass", fontsize=8)
            if mask.kind == "channel":
                bars = axis.inset_axes((0, -0.02, 1, 0.14))
                bars.imshow(mask.of_channels[i][None].cpu().numpy(), cmap="viridis", aspect="auto", vmin=0, vmax=1)
                bars.set(xticks=[], yticks=[])
    axes[0, 0].set_title("input", fontsize=9)
    for axis, mask in zip(axes[0, 1:], masks, strict=True):
        _, stage, _, number = mask.block.split(".")
        height, width = mask.over_image.shape[1:]
        axis.set_title(f"stage {int(stage) + 1}, block {int(number) + 1}\n{mask.kind}, {height}x{width}", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    below = "\nstrips: how often each channel is open" if any(mask.kind == "channel" for mask in masks) else ""
    figure.suptitle(f"What passes (bright), scaled by column{below}", fontsize=10)
    figure.savefig(path, dpi=110)


def run(argv: Sequence[str]) -> None:
    flags = checkpoint_parser(__doc__)
    flags.add_argument("--samples", type=positive, default=8, help="test samples to draw (8)")
    args, rest = flags.parse_known_args(argv)
    for subject, label in zip(subjects(args, rest), short_names(args.checkpoint), strict=True):
        suffix = f"-{label}" if len(args.checkpoint) > 1 else ""
        csv, picture = (args.output_dir / f"attention_masks{suffix}.{kind}" for kind in ("csv", "png"))
        images, labels = subject.samples(args.samples)
        masks = measure(subject, images)
        rows = [
            {
                "sample": i,
                "label": labels[i].item(),
                "block": mask.block,
                "kind": mask.kind,
                "passing": mask.passing[i].item(),
                "mask": " ".join(f"{value:.3f}" for value in mask.over_image[i].flatten().tolist()),
            }
            for mask in masks
            for i in range(len(images))
        ]
        write_csv(csv, rows)
        draw(subject, images, labels, masks, picture)
        for mask in masks:
            logger.info(f"{mask.block}: {mask.passing.mean():.1%} of the {mask.kind}s pass")
        logger.info(f"written: {csv}, {picture}")


if __name__ == "__main__":
    main(run)
