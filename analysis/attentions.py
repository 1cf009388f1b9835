"""Attentions by themselves, to compare their growth: counted operations, and forward with backward pass."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.attention import ChannelQKAttention, SpikingSelfAttention, TokenQKAttention

FIRING_RATE = 0.2


class QuadraticSelfAttention(SpikingSelfAttention):
    """Self-attention as (q k^T) v: the same spikes as from q (k^T v), through a map of tokens by tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Spikes [T,B,h,d,N] of query, key and value to spikes of the same shape."""
        qk = k.mT @ q  # [T,B,h,N,N], the transpose of q k^T with tokens as rows
        return self.attn_lif(v @ qk * self.scale)


MODULES = {
    "self": SpikingSelfAttention,
    "quadratic": QuadraticSelfAttention,
    "token": TokenQKAttention,
    "channel": ChannelQKAttention,
}
PARTS = {"core": tuple(MODULES), "module": ("self", "token", "channel")}  # attentions to compare


class Attention(NamedTuple):
    """An attention at n tokens and d channels, for one sample at one time step.

    Its part "core" runs from the spikes of q, k and v to those for the projection; "module" is all of it.
    """

    kind: str
    part: str
    n: int
    d: int
    heads: int

    def module(self) -> nn.Module:
        """Create the module."""
        return MODULES[self.kind](self.d, self.heads)

    def operations(self) -> int:
        """Count additions or multiply-accumulates, without the neurons and the scale before them."""
        n, d = self.n, self.d
        products = {"self": 2 * n * d * d // self.heads, "quadratic": 2 * n * n * d}
        core = products.get(self.kind, 2 * n * d)  # else the sum over the query, and the mask on the key
        weights = (p.numel() for p in self.module().parameters() if p.dim() > 1 and self.part == "module")
        return core + n * sum(weights)

    def step(self, device: torch.device) -> tuple[Callable[..., object], list[Tensor], list[nn.Parameter]]:
        """Return forward and backward pass as a function of spikes, these spikes, and the parameters."""
        module = self.module().to(device)
        shape, count, call = (1, 1, self.d, self.n, 1), 1, module
        if self.part == "core":
            shape, call = (1, 1, self.heads, self.d // self.heads, self.n), module.attend
            count = 3 if isinstance(module, SpikingSelfAttention) else 2  # q, k and v, or q and k
        rng, parameters = torch.Generator().manual_seed(0), list(module.parameters())
        *spikes, gradient = ((torch.rand(shape, generator=rng) < FIRING_RATE).float() for _ in range(count + 1))
        spikes, gradient = [x.to(device).requires_grad_() for x in spikes], gradient.to(device)

        def step(*inputs: Tensor) -> tuple:
            return torch.autograd.grad(call(*inputs), [*inputs, *parameters], gradient, allow_unused=True)

        return step, spikes, parameters
