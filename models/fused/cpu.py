"""Units and attentions for evaluation on a CPU, with BatchNorm folded into the weights and neurons in place."""

import torch
from torch import Tensor

from ..attention import SpikingAttention
from ..layers import ConvBN, SpikingConv
from ..neuron import TAU, THRESHOLD
from .plan import Run, attend_by_module, convolution


def attend(m: SpikingAttention, x: Tensor, run: Run) -> Tensor:
    """Compute an attention up to its projection: spikes [T,B,H,W,C]."""
    units = m.units()
    weights, biases = zip(*map(folded, units), strict=True)
    return attend_by_module(m, lif_(convolution(x, m.q.conv, torch.cat(weights), torch.cat(biases))), len(units))


def spiking_conv(m: SpikingConv, x: Tensor, run: Run, binary: bool, add: Tensor | None = None) -> Tensor:
    """Compute a `SpikingConv` and the residual addition after it."""
    y = convolution(x, m.conv, *folded(m))
    y = m.pool(y.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, y.shape[:2])
    if len(y) < run.steps:
        y = y.repeat(run.steps, 1, 1, 1, 1)
    spikes = lif_(y.flatten(0, 1) if m.lif.leak_across_batch else y).view_as(y)
    return spikes if add is None else spikes.add_(add)


def folded(m: ConvBN) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution that equals `m.conv` with `m.bn`."""
    scale = m.bn.weight * torch.rsqrt(m.bn.running_var + m.bn.eps)
    shift = m.bn.running_mean if m.conv.bias is None else m.bn.running_mean - m.conv.bias
    weight = m.conv.weight * scale.view(-1, *[1] * (m.conv.weight.dim() - 1))
    dtype = m.conv.weight.dtype  # BatchNorm may be in float32 in a network of half precision
    return weight.to(dtype), (m.bn.bias - shift * scale).to(dtype)


def lif_(x: Tensor) -> Tensor:
    """Turn currents [T, ...] into spikes, in place."""
    v = torch.zeros_like(x[0])
    for h in x:
        torch.lerp(v, h, 1 / TAU, out=h)
        v = h.masked_fill(h >= THRESHOLD, 0.0)
        torch.ge(h, THRESHOLD, out=h)
    return x
