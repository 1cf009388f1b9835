"""The fused network: the modules and parameters of `models.hst`, computed with fewer and larger kernels.

Activations are channels-last, [T,B,H,W,C], so that a 1x1 convolution is a matrix product; the image enters once as
[1,B,H,W,C]. A convolution in front of a BatchNorm leaves its bias to the running mean.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import SpikingSelfAttention, TokenQKAttention
from ..embed import SPEDS
from ..layers import DropPath, SpikingConv
from ..neuron import THRESHOLD
from . import linear_lif
from .common import CHUNK
from .functions import Unit, norm_lif_of, self_attention_of, token_attention_of
from .packing import packed
from .statistics import Norm, norm_of


class Run(NamedTuple):
    """What a forward pass is told."""

    steps: int  # T
    pack: bool  # keep spikes for the backward pass packed


def forward(m: nn.Module, x: Tensor, run: Run) -> Tensor:
    """A `SPEDS` or `Block`: [T,B,H,W,C] to [T,B,H',W',C']; the first SPEDS takes the image [1,B,H,W,C], too."""
    return speds(m, x, run) if isinstance(m, SPEDS) else block(m, x, run)


def speds(m: SPEDS, x: Tensor, run: Run) -> Tensor:
    """`models.embed.SPEDS`."""
    takes_images = m.branch > 0
    for i, unit in enumerate(m.units[: m.branch]):
        x = spiking_conv(unit, x, run._replace(pack=run.pack and i > 0), binary=True)
    y = x
    for unit in m.units[m.branch :]:
        y = spiking_conv(unit, y, run, binary=takes_images or y is not x)
    return y if m.shortcut is None else spiking_conv(m.shortcut, x, run, binary=takes_images, add=y)


def block(m: nn.Module, x: Tensor, run: Run) -> Tensor:
    """`models.hst.Block`."""
    x = residual(m.drop_path, m.attn.proj, attend(m.attn, x, run), x, run)
    return residual(m.drop_path, m.mlp.fc2, spiking_conv(m.mlp.fc1, x, run, binary=False), x, run)


def residual(drop_path: DropPath, last: SpikingConv, branch: Tensor, x: Tensor, run: Run) -> Tensor:
    """x plus the branch that ends in the unit `last`."""
    if drop_path.training and drop_path.rate:
        return x + drop_path(spiking_conv(last, branch, run, binary=True))
    return spiking_conv(last, branch, run, binary=True, add=x)


def attend(m: nn.Module, x: Tensor, run: Run) -> Tensor:
    """What an attention hands to its projection: spikes [T,B,H,W,C]."""
    units = [m.q, m.k, m.v] if isinstance(m, SpikingSelfAttention) else [m.q, m.k]
    with kept(x, run, binary=False):
        y = convolution(x, *(unit.conv for unit in units))
    unit = Unit(tuple(Norm(unit.bn, unit.conv.bias) for unit in units), run.steps)
    if isinstance(m, TokenQKAttention) and run.steps <= CHUNK:
        return token_attention_of(y, unit, m.heads)
    spikes = norm_lif_of(y, unit)
    if isinstance(m, SpikingSelfAttention) and run.steps <= CHUNK:
        with kept(spikes, run, binary=True):
            return self_attention_of(spikes, m.heads, m.scale)
    spikes = spikes.unflatten(4, (len(units), m.heads, -1)).flatten(2, 3)  # [T,B,N,2 or 3,h,d]
    passed = m.attend(*spikes.permute(3, 0, 1, 4, 5, 2))  # each [T,B,h,d,N]
    return passed.permute(0, 1, 4, 2, 3).reshape(x.shape)


def spiking_conv(m: SpikingConv, x: Tensor, run: Run, binary: bool, add: Tensor | None = None) -> Tensor:
    """A `SpikingConv` and the residual addition behind it; `binary` says whether x holds spikes or sums of them."""
    if _fits_one_kernel(m, x):
        norm, _ = norm_of(x.new_empty((0, m.bn.num_features)), [Norm(m.bn, m.conv.bias)], 1)
        sew = None if add is None else add.contiguous().flatten(1, 3)
        weight = m.conv.weight.flatten(1).to(x.dtype)
        spikes = linear_lif.forward(x.contiguous().flatten(1, 3), weight, norm, sew, THRESHOLD)
        return spikes.unflatten(1, x.shape[1:4])
    with kept(x, run, binary):
        y = convolution(x, m.conv)
    pools = not isinstance(m.pool, nn.Identity)
    return norm_lif_of(y, Unit((Norm(m.bn, m.conv.bias),), run.steps, pools, m.lif.leak_across_batch), add)


def _fits_one_kernel(m: SpikingConv, x: Tensor) -> bool:
    half = x.dtype in (torch.float16, torch.bfloat16)
    learns = m.training or torch.is_grad_enabled()
    return half and not learns and _is_linear(m.conv) and not m.lif.leak_across_batch


def _is_linear(conv: nn.Module) -> bool:
    return max(conv.kernel_size) == 1 and max(conv.stride) == 1


def convolution(x: Tensor, *convs: nn.Module) -> Tensor:
    """Convolutions of the same input side by side, without their biases: [T,B,H,W,C] to [T,B,H',W',C' + ...]."""
    weight = convs[0].weight if len(convs) == 1 else torch.cat([conv.weight for conv in convs])
    if _is_linear(convs[0]):
        return F.linear(x, weight.flatten(1))
    images = x.flatten(0, 1).permute(0, 3, 1, 2)  # [T*B,C,H,W] in channels-last memory
    y = F.conv2d(images, weight, None, convs[0].stride, convs[0].padding)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def kept(spikes: Tensor, run: Run, binary: bool) -> contextlib.AbstractContextManager:
    """How autograd keeps `spikes` within it."""
    return packed(spikes, binary) if run.pack and torch.is_grad_enabled() else contextlib.nullcontext()
