"""What the stages of a network are, read off the network as it is built."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import HierarchicalSpikingTransformer
from models.embed import SPS
from models.layers import ConvBN, SpikingConv
from models.qkformer import ATTENTIONS


class Stage(NamedTuple):
    """What a stage of a built network is; texts are those of the figure."""

    grid: tuple[int, int]  # H, W of the tokens that leave it
    channels: int
    embed: str
    units: list[str]
    branch: int  # how many units precede the shortcut
    shortcut: str | None
    depth: int
    kind: str
    heads: int
    mlp: tuple[int, int]  # channels in, and hidden
    scale: float | None  # of the product in self-attention
    parameters: int


def describe(model: HierarchicalSpikingTransformer, x: Tensor) -> list[Stage]:
    """The stages of a network on the meta device, for input `x`: images [B,C,H,W] or event frames [B,T,C,H,W]."""
    shapes = []
    for stage in model.stages:
        [stage.embed, *stage.blocks][-1].register_forward_hook(lambda *call: shapes.append(call[2].shape))
    with torch.no_grad():
        model.eval()(x)
    return [_describe(stage, shape) for stage, shape in zip(model.stages, shapes, strict=True)]


def _describe(stage: nn.Module, shape: torch.Size) -> Stage:
    embed, block = stage.embed, stage.blocks[0]
    if isinstance(embed, SPS):
        pools = [not isinstance(pool, nn.Identity) for pool in embed.pools]
        units = [_unit(unit) + " · pool" * pool for unit, pool in zip(embed.units, pools, strict=True)]
        branch, shortcut = len(units) - 1, "identity" if embed.shortcut else None
    else:
        units, branch = [_unit(unit) for unit in embed.units], embed.branch
        shortcut = _unit(embed.shortcut) if embed.shortcut else None
    (kind,) = (name for name, cls in ATTENTIONS.items() if isinstance(block.attn, cls))
    convolution = block.mlp.fc1.conv
    return Stage(
        grid=tuple(shape[3:]),
        channels=shape[2],
        embed=type(embed).__name__,
        units=units,
        branch=branch,
        shortcut=shortcut,
        depth=len(stage.blocks),
        kind=kind,
        heads=block.attn.heads,
        mlp=(convolution.in_channels, convolution.out_channels),
        scale=getattr(block.attn, "scale", None),
        parameters=parameters(stage),
    )


def _unit(unit: ConvBN) -> str:
    size, stride = unit.conv.kernel_size[0], unit.conv.stride[0]
    parts = [f"{size}×{size} → {unit.conv.out_channels}" + f", ↓{stride}" * (stride > 1)]
    parts += ["pool"] * (not isinstance(unit.pool, nn.Identity)) + ["LIF"] * isinstance(unit, SpikingConv)
    return " · ".join(parts)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
