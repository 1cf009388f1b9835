"""The fused network: the same modules and parameters as `models.hst`, computed with fewer and larger kernels.

Activations are channels-last, [T,B,H,W,C], so that a 1x1 convolution is a matrix product; the image enters once as
[1,B,H,W,C]. A biased convolution in front of a BatchNorm leaves its bias to the running mean.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import SpikingSelfAttention, TokenQKAttention
from ..embed import SPEDS
from ..layers import SpikingConv
from ..neuron import THRESHOLD
from . import linear_lif
from .common import CHUNK
from .functions import Unit, norm_lif_of, self_attention_of, token_attention_of
from .statistics import Norm, norm_of


def convolution(x: Tensor, *convs: nn.Module) -> Tensor:
    """Convolutions of the same input side by side, without their biases: [T,B,H,W,C] to [T,B,H',W',C' + ...]."""
    weight = convs[0].weight if len(convs) == 1 else torch.cat([conv.weight for conv in convs])
    if weight[0, 0].numel() == 1 and max(convs[0].stride) == 1:
        return F.linear(x, weight.flatten(1))
    images = x.flatten(0, 1).permute(0, 3, 1, 2)  # [T*B,C,H,W] in channels-last memory
    y = F.conv2d(images, weight, None, convs[0].stride, convs[0].padding)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def spiking_conv(m: SpikingConv, x: Tensor, steps: int, add: Tensor | None = None) -> Tensor:
    """A `SpikingConv`, and the residual addition behind it."""
    pools = not isinstance(m.pool, nn.Identity)
    if _in_one_kernel(m, x, add):
        norm, _ = norm_of(x.new_empty((0, m.bn.num_features)), [Norm(m.bn, m.conv.bias)], 1)
        sew = None if add is None else add.contiguous().flatten(1, 3)
        weight = m.conv.weight.flatten(1).to(x.dtype)
        spikes = linear_lif.forward(x.contiguous().flatten(1, 3), weight, norm, sew, THRESHOLD)
        return spikes.unflatten(1, x.shape[1:4])
    unit = Unit((Norm(m.bn, m.conv.bias),), steps, pools, m.lif.leak_across_batch)
    return norm_lif_of(convolution(x, m.conv), unit, add)


def _in_one_kernel(m: SpikingConv, x: Tensor, add: Tensor | None) -> bool:
    is_linear = m.conv.weight[0, 0].numel() == 1 and max(m.conv.stride) == 1
    half = x.dtype in (torch.float16, torch.bfloat16)
    return is_linear and half and not (m.training or torch.is_grad_enabled() or m.lif.leak_across_batch)


def speds(m: nn.Module, x: Tensor, steps: int) -> Tensor:
    """`models.embed.SPEDS`."""
    for unit in m.units[: m.branch]:
        x = spiking_conv(unit, x, steps)
    y = x
    for unit in m.units[m.branch :]:
        y = spiking_conv(unit, y, steps)
    return y if m.shortcut is None else spiking_conv(m.shortcut, x, steps, add=y)


def attend(m: nn.Module, x: Tensor) -> Tensor:
    """What an attention hands to its projection: spikes [T,B,H,W,C]."""
    steps = len(x)
    units = [m.q, m.k, m.v] if isinstance(m, SpikingSelfAttention) else [m.q, m.k]
    y = convolution(x, *(unit.conv for unit in units))
    unit = Unit(tuple(Norm(unit.bn, unit.conv.bias) for unit in units), steps)
    if isinstance(m, TokenQKAttention) and steps <= CHUNK:
        return token_attention_of(y, unit, m.heads)
    spikes = norm_lif_of(y, unit)
    if isinstance(m, SpikingSelfAttention) and steps <= CHUNK:
        return self_attention_of(spikes, m.heads, m.scale)
    spikes = spikes.unflatten(4, (len(units), m.heads, -1)).flatten(2, 3)  # [T,B,N,2|3,h,d]
    passed = m.attend(*spikes.permute(3, 0, 1, 4, 5, 2))  # each [T,B,h,d,N]
    return passed.permute(0, 1, 4, 2, 3).reshape(x.shape)


def residual(m: nn.Module, drop_path: nn.Module, branch: Tensor, last: SpikingConv, x: Tensor) -> Tensor:
    """x plus the branch that ends in the unit `last`."""
    if m.training and drop_path.rate:
        return x + drop_path(spiking_conv(last, branch, len(x)))
    return spiking_conv(last, branch, len(x), add=x)


def block(m: nn.Module, x: Tensor) -> Tensor:
    """`models.hst.Block`."""
    x = residual(m, m.drop_path, attend(m.attn, x), m.attn.proj, x)
    return residual(m, m.drop_path, spiking_conv(m.mlp.fc1, x, len(x)), m.mlp.fc2, x)


def forward(m: nn.Module, x: Tensor, steps: int) -> Tensor:
    """A `SPEDS` or `Block` over T = `steps`: [T,B,H,W,C] to the same, or the image [1,B,H,W,C]."""
    return speds(m, x, steps) if isinstance(m, SPEDS) else block(m, x)
