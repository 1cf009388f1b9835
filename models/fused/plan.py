"""Forward pass of `models.qkformer` in few large steps; `gpu` or `cpu` computes units and attentions.

Activations are channels-last, [T,B,H,W,C], because a 1x1 convolution is a matrix product then. An image enters once,
as [1,B,H,W,C].
"""

import functools
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..embed import SPEDS
from ..layers import Chain, DropPath, SpikingConv, checkpointed


class Run(NamedTuple):
    """Options of one forward pass."""

    steps: int  # T
    ops: ModuleType  # `gpu` or `cpu`
    pack: bool = False  # keep packed spikes for the backward pass


def stage_outputs(model: nn.Module, x: Tensor, ops: ModuleType, pack: bool = False) -> Iterator[Tensor]:
    """Yield the output [T,B,C,H,W] of each stage for [B,C,H,W] or [B,T,C,H,W]."""
    if x.dim() == 4:
        x, steps = x[None], model.time_steps  # [1,B,C,H,W]
    else:
        x, steps = x.transpose(0, 1), x.shape[1]  # [T,B,C,H,W]
    x = x.permute(0, 1, 3, 4, 2).contiguous()  # [T,B,H,W,C]
    run = Run(steps, ops, pack)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        for stage in model.stages:
            x = forward(stage, x, run)
            yield x.permute(0, 1, 4, 2, 3)


def forward(m: nn.Module, x: Tensor, run: Run) -> Tensor:
    """Compute a `Chain`, `SPEDS` or `Block`: [T,B,H,W,C] to [T,B,H',W',C']; the first SPEDS takes [1,B,H,W,C]."""
    if isinstance(m, Chain):
        for module in m:
            compute = functools.partial(forward, module, run=run)
            x = checkpointed(module, x, compute) if m.recomputes(module) else compute(x)
        return x
    return _speds(m, x, run) if isinstance(m, SPEDS) else _block(m, x, run)


def _speds(m: SPEDS, x: Tensor, run: Run) -> Tensor:
    takes_images = m.branch > 0
    for i, unit in enumerate(m.units[: m.branch]):
        x = run.ops.spiking_conv(unit, x, run._replace(pack=run.pack and i > 0), binary=True)
    y = x
    for unit in m.units[m.branch :]:
        y = run.ops.spiking_conv(unit, y, run, binary=takes_images or y is not x)
    return y if m.shortcut is None else run.ops.spiking_conv(m.shortcut, x, run, binary=takes_images, add=y)


def _block(m: nn.Module, x: Tensor, run: Run) -> Tensor:
    x = _residual(m.drop_path, m.attn.proj, run.ops.attend(m.attn, x, run), x, run)
    return _residual(m.drop_path, m.mlp.fc2, run.ops.spiking_conv(m.mlp.fc1, x, run, binary=False), x, run)


def _residual(drop_path: DropPath, last: SpikingConv, branch: Tensor, x: Tensor, run: Run) -> Tensor:
    """Apply the last unit of a branch, and add the result to x."""
    if drop_path.training and drop_path.rate:
        return x + drop_path(run.ops.spiking_conv(last, branch, run, binary=True))
    return run.ops.spiking_conv(last, branch, run, binary=True, add=x)


def is_linear(conv: nn.Module) -> bool:
    """Return whether the convolution is a matrix product."""
    return max(conv.kernel_size) == 1 and max(conv.stride) == 1


def convolution(x: Tensor, conv: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply `conv` with another weight and bias: [T,B,H,W,C] to [T,B,H',W',C']."""
    if is_linear(conv):
        return nn.functional.linear(x, weight.flatten(1), bias)
    images = x.flatten(0, 1).permute(0, 3, 1, 2)  # [T*B,C,H,W] in channels-last memory
    y = nn.functional.conv2d(images, weight, bias, conv.stride, conv.padding)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def attend_by_module(m: nn.Module, spikes: Tensor, parts: int) -> Tensor:
    """Apply `m.attend` to spikes [T,B,H,W,parts*C] of query, key and value: [T,B,H,W,C]."""
    heads = spikes.unflatten(4, (parts, m.heads, -1)).flatten(2, 3)  # [T,B,N,parts,h,d]
    passed = m.attend(*heads.permute(3, 0, 1, 4, 5, 2))  # [T,B,h,d,N]
    return passed.permute(0, 1, 4, 2, 3).reshape(*spikes.shape[:4], -1)
