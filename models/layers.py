"""Convolution units over time and the spiking MLP.

Shapes: T time steps, B batch, C channels, H height, W width, N = H*W tokens.
"""

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from timm.layers import drop_path
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .neuron import LIF


class ConvBN(nn.Module):
    """Convolution, BatchNorm and optional max pooling (3x3, stride 2, padding 1), the same at every time step.

    [T,B,C,H,W] -> [T,B,C',H',W'], or [T,B,C,N] -> [T,B,C',N] with `tokens=True`. BatchNorm takes its
    statistics over time and batch.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        bias: bool = False,
        pool: bool = False,
        tokens: bool = False,
    ):
        super().__init__()
        conv, bn = (nn.Conv1d, nn.BatchNorm1d) if tokens else (nn.Conv2d, nn.BatchNorm2d)
        self.conv = conv(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
        self.bn = bn(out_channels)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.bn(self.conv(x.flatten(0, 1))))  # [T*B,C',H',W']
        return y.unflatten(0, x.shape[:2])  # [T,B,C',H',W']


class SpikingConv(ConvBN):
    """`ConvBN` with LIF neurons, the unit of all networks; see `LIF` for `leak_across_batch`."""

    def __init__(self, *args, leak_across_batch: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.lif = LIF(leak_across_batch=leak_across_batch)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(super().forward(x))


def residual_branch(residual: str) -> tuple[nn.Module, type[ConvBN]]:
    """Return the first module and the type of the last unit of a residual branch.

    A "sew" branch ends in spikes. An "ms" branch (membrane shortcut, pre-activation) starts with a LIF and ends in
    membrane currents.
    """
    return (LIF(), ConvBN) if residual == "ms" else (nn.Identity(), SpikingConv)


class SpikingMLP(nn.Module):
    """Two 1x1 convolutions with bias, each with BatchNorm and LIF (paper, section 3.1). Keeps [T,B,C,H,W]."""

    def __init__(self, dim: int, hidden: int, residual: str = "sew"):
        super().__init__()
        self.lif, last = residual_branch(residual)
        self.fc1 = SpikingConv(dim, hidden, bias=True)
        self.fc2 = last(hidden, dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.lif(x)))


class DropPath(nn.Module):
    """Stochastic depth of [T,B,...]: in training a sample is zero at all time steps with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.rate or not self.training:
            return x
        return drop_path(x.transpose(0, 1), self.rate, training=True).transpose(0, 1)


class Chain(nn.Sequential):
    """Modules in sequence. With `grad_checkpointing` the backward pass recomputes each module, except inner chains."""

    def __init__(self, *modules: nn.Module | OrderedDict[str, nn.Module]):
        super().__init__(*modules)
        self.grad_checkpointing = False

    def recomputes(self, module: nn.Module) -> bool:
        """Return whether the backward pass recomputes `module`."""
        return self.grad_checkpointing and self.training and not isinstance(module, Chain)

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = checkpointed(module, x) if self.recomputes(module) else module(x)
        return x


# The compiler recomputes all values, also inside the LIF, but does not update running statistics twice. torch
# warns of in-place operations here; the tests find equal results and gradients.
_RECOMPUTE_ALL = functools.partial(
    create_selective_checkpoint_contexts,
    lambda *_, **__: CheckpointPolicy.MUST_RECOMPUTE,
    allow_cache_entry_mutation=True,
)


def checkpointed(module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Compute `forward(x)`, or `module(x)`, and keep only `x` for the backward pass, which recomputes the rest."""
    if torch.compiler.is_compiling():
        return checkpoint(module, x, use_reentrant=False, context_fn=_RECOMPUTE_ALL)
    is_random = any(isinstance(m, DropPath) and m.rate for m in module.modules())
    return checkpoint(
        forward or module,
        x,
        use_reentrant=False,
        preserve_rng_state=is_random,  # copies the GPU generator's state, which fails in a CUDA graph
        context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(module)),
    )


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Protect the running statistics from the second forward pass on the same batch."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
