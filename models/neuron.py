"""Multi-step leaky integrate-and-fire neuron: the owner of tau, thresholds, surrogate and reset.

Shapes: T time steps, then any neuron shape; the networks use [T,B,C,H,W] and [T,B,C,N].
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TAU = 2.0  # membrane time constant in time steps; the input decays with it (spikingjelly: decay_input=True)
THRESHOLD = 1.0  # firing threshold; the reset is hard, to 0, and detached from the gradient
ATTN_THRESHOLD = 0.5  # firing threshold of the neurons that read the attention sums
ALPHA = 4.0  # slope of the sigmoid whose derivative stands in for the derivative of the spike


def lif_step(
    x: Tensor, v: Tensor, threshold: float = THRESHOLD, h: Tensor | None = None, spike: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute one time step of the LIF neuron, without state.

    The membrane follows tau dv/dt = -v + x, stepped by forward Euler with dt = 1 (paper, eq. 1-3):
    h = v + (x - v) / tau; spike = [h >= threshold]; v = h (1 - spike).

    Faster forms of this equation, which the tests compare with it: `_TorchLIF`, `backends.cupy_lif`, `fused.cpu.lif_`,
    and `charge`, `reset`, `current_gradient` in `fused.kernels.device`.

    Args:
        x: input current at this step, any shape.
        v: membrane potential after the step before, same shape; zeros at the start.
        threshold: firing threshold.
        h, spike: buffers of the same shape and dtype to write the charged membrane and the spikes to.

    Returns:
        (spike, v): 0/1 in the dtype of x, and the membrane potential after the reset.
    """
    h = torch.sub(x, v, out=h).div_(TAU).add_(v)
    spike = torch.ge(h, threshold, out=spike).to(x.dtype)
    return spike, h * (1 - spike)


class _TorchLIF(torch.autograd.Function):
    """`lif_step` over T, with the backward pass written out so that only h is kept: bit-equal to autograd's."""

    @staticmethod
    def forward(ctx, x: Tensor, threshold: float) -> Tensor:
        spikes = torch.empty_like(x)
        keep = ctx.needs_input_grad[0]
        h_seq = torch.empty_like(x if keep else x[:1])
        v = torch.zeros_like(x[0])
        for t in range(len(x)):
            _, v = lif_step(x[t], v, threshold, h=h_seq[t if keep else 0], spike=spikes[t])
        if keep:
            ctx.save_for_backward(h_seq)
            ctx.threshold = threshold
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_spikes: Tensor) -> tuple[Tensor, None]:
        (h_seq,) = ctx.saved_tensors
        grad_x = torch.empty_like(h_seq)
        grad_v = None  # of the membrane that step t hands to step t + 1
        for t in reversed(range(len(h_seq))):
            over_threshold = h_seq[t] - ctx.threshold
            sigmoid = torch.sigmoid(over_threshold * ALPHA)  # whose slope replaces the step's
            grad_h = grad_spikes[t] * (1 - sigmoid) * sigmoid * ALPHA  # spikingjelly's order of products: equal bits
            if grad_v is not None:
                grad_h.addcmul_(grad_v, (over_threshold < 0).to(grad_h.dtype))
            torch.div(grad_h, TAU, out=grad_x[t])
            grad_v = grad_h.sub_(grad_x[t])
        return grad_x, None


def torch_lif(x: Tensor, threshold: float) -> Tensor:
    """Compute multi-step LIF neurons on any device, in any floating dtype: currents [T, ...] to spikes."""
    return _TorchLIF.apply(x, threshold)


# LIF -> membrane at the end of the last call, while calls continue each other (see `continued`)
_membranes: ContextVar[dict[nn.Module, Tensor] | None] = ContextVar("membranes", default=None)


@contextlib.contextmanager
def continued(membranes: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Let every `LIF` start from its membrane in `membranes` (without one, at zero) and leave it there.

    Other threads are not affected: they can share a network.
    """
    token = _membranes.set(membranes)
    try:
        yield
    finally:
        _membranes.reset(token)


def is_continued() -> bool:
    """Return whether membranes are carried over at present."""
    return _membranes.get() is not None


def is_transformed() -> bool:
    """Return whether torch.export, torch.jit.trace or torch.func records or transforms the call.

    They need single operations without side effects, and get them from the steps of `LIF`.
    """
    if torch.compiler.is_dynamo_compiling():
        return False  # the compiler takes autograd functions as they are
    is_in_func = torch._C._are_functorch_transforms_active()  # torch has no public name for it
    return is_in_func or torch.compiler.is_exporting() or torch.jit.is_tracing()


class LIF(nn.Module):
    """Multi-step LIF neurons: currents [T, ...] to spikes [T, ...], the membrane at zero before and after.

    Within `continued` the membrane goes on from one call to the next.

    Args:
        threshold: firing threshold.
        leak_across_batch: run the membrane over the samples of a batch as if they were time steps (order t*B + b), as
            the last LIF of the released self-attention does (`ssa_membrane="released"` of a network).
    """

    def __init__(self, threshold: float = THRESHOLD, leak_across_batch: bool = False, tau: float = TAU):
        super().__init__()
        if not tau >= 1:  # NaN, too
            raise ValueError(f"tau={tau} must be at least 1")
        self.threshold = threshold
        self.leak_across_batch = leak_across_batch
        self.tau = tau
        self.function: Callable[[Tensor, float], Tensor] = torch_lif  # `models.backends` sets others

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            raise TypeError("torch.fx: spiking neurons cannot be traced; use leaf_modules=[LIF], or features_only=True")
        if self.leak_across_batch:
            return self._over_time(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self._over_time(x)

    def charge(self, x: Tensor, v: Tensor | float) -> Tensor:
        """Return the membrane before the reset from the current of a step and the membrane after the step before."""
        return v + (x - v) / self.tau

    def _over_time(self, x: Tensor) -> Tensor:
        membranes = None if torch.compiler.is_dynamo_compiling() else _membranes.get()  # dynamo knows no ContextVar
        if membranes is None and type(self) is LIF and self.tau == TAU and not is_transformed():
            return self.function(x, self.threshold)
        spikes, v = self._steps(x, 0.0 if membranes is None else membranes.get(self, 0.0))
        if membranes is not None:
            membranes[self] = v
        return spikes

    def _steps(self, x: Tensor, v: Tensor | float) -> tuple[Tensor, Tensor]:
        """Run over T from membrane `v`, step by step; return spikes [T, ...] and the last membrane."""
        spikes = []
        for x_t in x.split(1):  # [1, ...]: an exported graph has one node to split and one to join
            h = self.charge(x_t, v)
            spike = torch.ge(h, self.threshold).to(x.dtype)
            v = h * (1 - spike)
            if torch.is_grad_enabled() or torch.jit.is_tracing():  # which checks its graph without gradients
                surrogate = torch.sigmoid((h - self.threshold) * ALPHA)
                spike = spike + (surrogate - surrogate.detach())  # the value of the one, the gradient of the other
            spikes.append(spike)
        return torch.cat(spikes), v

    def __prepare_scriptable__(self) -> "LIF":
        raise TypeError("torch.jit.script: spiking neurons cannot be scripted; use torch.export or torch.jit.trace")

    def extra_repr(self) -> str:
        leak = ", leak_across_batch=True" if self.leak_across_batch else ""
        return f"threshold={self.threshold}, tau={self.tau}, function={self.function.__name__}{leak}"


class IF(LIF):
    """Integrate-and-fire neurons: the membrane does not decay (spikingjelly's `IFNode`). See `LIF`."""

    def charge(self, x: Tensor, v: Tensor | float) -> Tensor:
        return v + x


class PLIF(LIF):
    """LIF neurons with one learned tau a layer, 1 / sigmoid(w) (spikingjelly's `ParametricLIFNode`). See `LIF`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.tau == 1:
            raise ValueError("tau=1 must be above 1 with neuron='plif'")
        self.w = nn.Parameter(torch.tensor(-math.log(self.tau - 1)))

    def charge(self, x: Tensor, v: Tensor | float) -> Tensor:
        return v + (x - v) * self.w.sigmoid()


NEURONS = {"lif": LIF, "if": IF, "plif": PLIF}


def set_neurons(model: nn.Module, kind: str, tau: float = TAU) -> None:
    """Replace every `LIF` of `model` by a neuron of `kind`, a key of `NEURONS`, and set its time constant."""
    if kind not in NEURONS:
        raise ValueError(f"neuron={kind!r} is unknown: choose one of {', '.join(NEURONS)}")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LIF):
                neuron = NEURONS[kind](child.threshold, child.leak_across_batch, tau)
                neuron.function = child.function
                setattr(module, name, neuron)
