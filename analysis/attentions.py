"""Single attentions, to compare how operations, memory and time grow."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from models.attention import ChannelQKAttention, SpikingSelfAttention, TokenQKAttention

from .common import published

FIRING_RATE = 0.2
LABELS = {"token": "Q-K token", "self": "q (k^T v)", "quadratic": "(q k^T) v"}  # in the table of memory


class QuadraticSelfAttention(SpikingSelfAttention):
    """Self-attention as (q k^T) v: the same spikes as from q (k^T v), through a map of tokens by tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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
    """Attention at n tokens and d channels, for one sample at one time step."""

    kind: str
    part: str  # "core": from the spikes of q, k and v to those before the projection; "module": all
    n: int
    d: int
    heads: int

    def module(self) -> nn.Module:
        return MODULES[self.kind](self.d, self.heads)

    def operations(self) -> int:
        """Count additions or multiply-accumulates, without scale and neurons."""
        n, d = self.n, self.d
        products = {"self": 2 * n * d * d // self.heads, "quadratic": 2 * n * n * d}
        core = products.get(self.kind, 2 * n * d)  # else the sum over the query, and the mask on the key
        weights = (p.numel() for p in self.module().parameters() if p.dim() > 1 and self.part == "module")
        return core + n * sum(weights)

    def counted_bytes(self) -> int:
        """Count the bytes of float32 sums, masks and products in the core, without scale and neurons."""
        maps = {"self": self.d**2 // self.heads, "quadratic": self.heads * self.n**2}
        maps |= {"token": self.heads * self.n, "channel": self.d}
        return 4 * (maps[self.kind] + self.n * self.d)

    def measured_bytes(self) -> int:
        """Measure the peak bytes of a forward pass of the core, with its neurons, beyond its inputs."""
        return peak_bytes(self.module().attend, *self.spikes(self.inputs))

    @property
    def inputs(self) -> int:
        """Return the number of inputs of the core: query and key, and value in self-attention."""
        return 3 if self.kind in ("self", "quadratic") else 2

    def spikes(self, count: int) -> list[Tensor]:
        """Draw spikes: `count` tensors [1,1,h,d,N]."""
        rng, shape = torch.Generator().manual_seed(0), (1, 1, self.heads, self.d // self.heads, self.n)
        return [(torch.rand(shape, generator=rng) < FIRING_RATE).float() for _ in range(count)]

    def step(self, device: torch.device) -> tuple[Callable[..., object], list[Tensor], list[nn.Parameter]]:
        """Return a forward and backward pass as a function, its input spikes, and the parameters."""
        module = self.module().to(device)
        *spikes, gradient = self.spikes(self.inputs + 1)
        call, parameters = module.attend, list(module.parameters())
        if self.part == "module":
            spikes, gradient = [x.reshape(1, 1, self.d, self.n, 1) for x in (spikes[0], gradient)]
            spikes, call = [spikes], module
        spikes, gradient = [x.to(device).requires_grad_() for x in spikes], gradient.to(device)

        def step(*inputs: Tensor) -> tuple:
            return torch.autograd.grad(call(*inputs), [*inputs, *parameters], gradient, allow_unused=True)

        return step, spikes, parameters


def peak_bytes(call: Callable[..., object], *inputs: Tensor) -> int:
    """Measure the peak bytes of tensors that a call creates on the CPU."""
    tracker, device = MemTracker(), torch.device("cpu")
    tracker.track_external(*inputs)
    before = sum(x.nbytes for x in inputs)
    with torch.no_grad(), tracker:
        call(*inputs)
    return tracker.get_tracker_snapshot("peak")[device]["Total"] - before


def memory() -> list[dict]:
    """Return the memory (MiB) of a head of each attention, a row for each number of tokens, and the paper's figures."""
    paper, rows = published("attention_memory"), []
    for side in (10, 20, 30, 40, 50):
        row = {"N": side**2}
        for kind, label in LABELS.items():
            attention = Attention(kind, "core", side**2, paper["channels"], heads=1)
            counts = {"counted": attention.counted_bytes(), "measured": attention.measured_bytes()}
            row |= {f"{label}: {how}": size / 2**20 for how, size in counts.items()}
            if kind in paper:
                row[f"{label}: paper (to be verified)"] = paper[kind] if side**2 == paper["tokens"] else None
        rows.append(row)
    return rows
