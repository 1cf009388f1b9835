"""Three spiking attentions without softmax; queries, keys and values are spikes.

Shapes: T time steps, B batch, C channels, H height, W width, N = H*W tokens, h heads, d = C/h channels a head.
Each attention maps [T,B,C,H,W] to [T,B,C,H,W].

To add an attention, write a class here and list it in `qkformer.ATTENTIONS`. For the fused path also list it in
`fused.coverage.ATTENTIONS`, and in `fused.gpu.attend` if it has a kernel.
"""

from torch import Tensor, nn

from .layers import SpikingConv, residual_branch
from .neuron import ATTN_THRESHOLD, LIF

SSA_SCALE = 0.125


class SpikingAttention(nn.Module):
    """Base class: units of query, key and optionally value, then `attend` of a subclass and a projection.

    Args:
        qkv_bias: bias of the q, k and v convolutions; the BatchNorm after them cancels it.
        leak_across_batch: let the membrane after the projection leak across the batch, as in the released code.
    """

    parts = ("q", "k")

    def __init__(
        self,
        dim: int,
        heads: int,
        residual: str = "sew",
        qkv_bias: bool = False,
        leak_across_batch: bool = False,
    ):
        super().__init__()
        self.heads = heads
        self.lif, last = residual_branch(residual)
        for part in self.parts:
            self.add_module(part, SpikingConv(dim, dim, bias=qkv_bias, tokens=True))
        self.attn_lif = LIF(ATTN_THRESHOLD)
        leak = {"leak_across_batch": True} if leak_across_batch else {}
        self.proj = last(dim, dim, bias=True, tokens=True, **leak)

    def units(self) -> list[SpikingConv]:
        """Return the units in the order of `parts`."""
        return [getattr(self, part) for part in self.parts]

    def attend(self, *spikes: Tensor) -> Tensor:
        """Map the spikes of each of `parts`, [T,B,h,d,N], to spikes of the same shape."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x_tokens = self.lif(x).flatten(3)  # [T,B,C,N]
        spikes = [unit(x_tokens).unflatten(2, (self.heads, -1)) for unit in self.units()]  # each [T,B,h,d,N]
        y = self.proj(self.attend(*spikes).flatten(2, 3))  # [T,B,C,N]
        return y.unflatten(3, x.shape[3:])  # [T,B,C,H,W]


class TokenQKAttention(SpikingAttention):
    """Q-K token attention (QKTA; paper, section 3.2): the sum of the query over a head's channels masks tokens."""

    def attend(self, q: Tensor, k: Tensor) -> Tensor:
        return self.attn_lif(q.sum(3, keepdim=True)) * k  # [T,B,h,1,N] * [T,B,h,d,N]


class ChannelQKAttention(SpikingAttention):
    """Q-K channel attention (QKCA; paper, section 3.2): the sum of the query over the tokens masks channels."""

    def attend(self, q: Tensor, k: Tensor) -> Tensor:
        return self.attn_lif(q.sum(4, keepdim=True)) * k  # [T,B,h,d,1] * [T,B,h,d,N]


class SpikingSelfAttention(SpikingAttention):
    """Spiking self-attention (SSA, from Spikformer): LIF(q (k^T v) * scale); this order makes it linear in N."""

    parts = ("q", "k", "v")

    def __init__(self, dim: int, heads: int, residual: str = "sew", scale: float = SSA_SCALE, **kwargs):
        super().__init__(dim, heads, residual, **kwargs)
        self.scale = scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = v @ k.mT  # [T,B,h,d,d], the transpose of k^T v with tokens as rows
        return self.attn_lif(kv @ q * self.scale)
