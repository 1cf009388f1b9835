"""Three spiking attentions. None has a softmax; queries, keys and values are spikes.

Shapes: T time steps, B batch, C channels, H height, W width, N = H*W tokens, h heads, d = C/h channels a head.
Each attention maps [T,B,C,H,W] to [T,B,C,H,W].

To add one, write a class here and name it in `qkformer.ATTENTIONS`. The modules then compute networks with it; the
fused path takes it once `fused.coverage.CHILDREN` and `attend` in `fused.cpu` and `fused.gpu` know it.
"""

from torch import Tensor, nn

from .layers import SpikingConv, residual_branch
from .neuron import ATTN_THRESHOLD, LIF

SSA_SCALE = 0.125


class _QKAttention(nn.Module):
    """Q-K attention (paper, section 3.2): a sum of the query's spikes decides which keys pass."""

    sum_dim: int  # axis of [T,B,h,d,N] over which the query is summed

    def __init__(self, dim: int, heads: int, residual: str = "sew", qkv_bias: bool = False):
        super().__init__()
        self.heads = heads
        self.lif, last = residual_branch(residual)
        self.q = SpikingConv(dim, dim, bias=qkv_bias, tokens=True)
        self.k = SpikingConv(dim, dim, bias=qkv_bias, tokens=True)
        self.attn_lif = LIF(ATTN_THRESHOLD)
        self.proj = last(dim, dim, bias=True, tokens=True)

    def attend(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the keys that pass, [T,B,h,d,N], from spikes of query and key of this shape."""
        mask = self.attn_lif(q.sum(self.sum_dim, keepdim=True))  # token: [T,B,h,1,N], channel: [T,B,h,d,1]
        return mask * k

    def forward(self, x: Tensor) -> Tensor:
        x_tokens = self.lif(x).flatten(3)  # [T,B,C,N]
        q = self.q(x_tokens).unflatten(2, (self.heads, -1))  # [T,B,h,d,N]
        k = self.k(x_tokens).unflatten(2, (self.heads, -1))  # [T,B,h,d,N]
        y = self.proj(self.attend(q, k).flatten(2, 3))  # [T,B,C,N]
        return y.unflatten(3, x.shape[3:])  # [T,B,C,H,W]


class TokenQKAttention(_QKAttention):
    """Q-K token attention (QKTA): the query, summed over a head's channels, masks tokens."""

    sum_dim = 3


class ChannelQKAttention(_QKAttention):
    """Q-K channel attention (QKCA): the query, summed over the tokens, masks channels."""

    sum_dim = 4


class SpikingSelfAttention(nn.Module):
    """Spiking self-attention (SSA, from Spikformer): LIF(q (k^T v) * scale), linear in N by its order.

    Args:
        scale: factor of the product; 1 is the paper's "w/o scaling".
        leak_across_batch: let the membrane after the projection run over the batch, as in the released code.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        residual: str = "sew",
        qkv_bias: bool = False,
        scale: float = SSA_SCALE,
        leak_across_batch: bool = False,
    ):
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.lif, last = residual_branch(residual)
        self.q = SpikingConv(dim, dim, bias=qkv_bias, tokens=True)
        self.k = SpikingConv(dim, dim, bias=qkv_bias, tokens=True)
        self.v = SpikingConv(dim, dim, bias=qkv_bias, tokens=True)
        self.attn_lif = LIF(ATTN_THRESHOLD)
        leak = {"leak_across_batch": True} if leak_across_batch else {}
        self.proj = last(dim, dim, bias=True, tokens=True, **leak)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map spikes [T,B,h,d,N] of query, key and value to spikes of the same shape."""
        kv = v @ k.mT  # [T,B,h,d,d], the transpose of k^T v with tokens as rows
        return self.attn_lif(kv @ q * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        x_tokens = self.lif(x).flatten(3)  # [T,B,C,N]
        q = self.q(x_tokens).unflatten(2, (self.heads, -1))  # [T,B,h,d,N]
        k = self.k(x_tokens).unflatten(2, (self.heads, -1))  # [T,B,h,d,N]
        v = self.v(x_tokens).unflatten(2, (self.heads, -1))  # [T,B,h,d,N]
        y = self.proj(self.attend(q, k, v).flatten(2, 3))  # [T,B,C,N]
        return y.unflatten(3, x.shape[3:])  # [T,B,C,H,W]
