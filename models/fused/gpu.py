"""Units and attentions in Triton kernels. The statistics of a BatchNorm include the bias of the convolution."""

import contextlib

import torch
from torch import Tensor, nn

from ..attention import SpikingAttention, SpikingSelfAttention, TokenQKAttention
from ..layers import SpikingConv
from ..neuron import THRESHOLD
from .autograd import Unit, norm_lif_of, self_attention_of, token_attention_of
from .kernels import linear_lif
from .kernels.bn_stats import Norm, norm_of
from .kernels.launch import CHUNK
from .kernels.packing import packed
from .plan import Run, attend_by_module, convolution, is_linear

ONE_KERNEL = True  # in evaluation compute a 1x1 convolution together with its neurons


def attend(m: SpikingAttention, x: Tensor, run: Run) -> Tensor:
    """Compute an attention up to its projection: spikes [T,B,H,W,C]."""
    units = m.units()
    with _kept(x, run, binary=False):
        y = convolution(x, m.q.conv, torch.cat([unit.conv.weight for unit in units]))
    unit = Unit(tuple(Norm(unit.bn, unit.conv.bias) for unit in units), run.steps)
    if isinstance(m, TokenQKAttention) and run.steps <= CHUNK:
        return token_attention_of(y, unit, m.heads)
    spikes = norm_lif_of(y, unit)
    if isinstance(m, SpikingSelfAttention) and run.steps <= CHUNK:
        with _kept(spikes, run, binary=True):
            return self_attention_of(spikes, m.heads, m.scale)
    return attend_by_module(m, spikes, len(units))


def spiking_conv(m: SpikingConv, x: Tensor, run: Run, binary: bool, add: Tensor | None = None) -> Tensor:
    """Compute a `SpikingConv` and the residual addition after it; `binary`: x holds spikes, not sums of spikes."""
    is_half = x.dtype in (torch.float16, torch.bfloat16)
    learns = m.bn.training or torch.is_grad_enabled()
    if ONE_KERNEL and is_half and not learns and is_linear(m.conv) and not m.lif.leak_across_batch:
        return _in_one_kernel(m, x, add)
    with _kept(x, run, binary):
        y = convolution(x, m.conv, m.conv.weight)
    pools = not isinstance(m.pool, nn.Identity)
    return norm_lif_of(y, Unit((Norm(m.bn, m.conv.bias),), run.steps, pools, m.lif.leak_across_batch), add)


def _in_one_kernel(m: SpikingConv, x: Tensor, add: Tensor | None) -> Tensor:
    norm, _ = norm_of(x.new_empty((0, m.bn.num_features)), [Norm(m.bn, m.conv.bias)], 1)
    sew = None if add is None else add.contiguous().flatten(1, 3)
    weight = m.conv.weight.flatten(1).to(x.dtype)
    return linear_lif.forward(x.contiguous().flatten(1, 3), weight, norm, sew, THRESHOLD).unflatten(1, x.shape[1:4])


def _kept(spikes: Tensor, run: Run, binary: bool) -> contextlib.AbstractContextManager:
    """Return the context in which autograd keeps `spikes`, packed or as they are."""
    return packed(spikes, binary) if run.pack and torch.is_grad_enabled() else contextlib.nullcontext()
