"""Multi-step leaky integrate-and-fire (LIF) neuron, and the constants of all neurons.

Shapes: T time steps, then any neuron shape; the networks use [T,B,C,H,W] and [T,B,C,N].
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TAU = 2.0  # membrane time constant in time steps; it also divides the input (spikingjelly: decay_input=True)
THRESHOLD = 1.0  # firing threshold; the reset is hard, to 0, and detached from the gradient
ATTN_THRESHOLD = 0.5  # firing threshold of the neurons that read the attention sums
ALPHA = 4.0  # slope of the sigmoid whose derivative replaces that of the spike


def require(holds: bool, problem: str) -> None:
    """Raise `ValueError(problem)` unless `holds`."""
    if not holds:
        raise ValueError(problem)


def require_choice(name: str, value: object, choices: Collection) -> None:
    """Raise `ValueError` unless the argument `name` has one of `choices`."""
    require(value in choices, f"{name}={value!r}: unknown; choose one of {', '.join(map(repr, choices))}")


def lif_step(
    x: Tensor, v: Tensor, threshold: float = THRESHOLD, h: Tensor | None = None, spike: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute one time step of the LIF neuron, without state: spikes, 0 or 1, and the membrane after the reset.

    The membrane follows tau dv/dt = -v + x, stepped by forward Euler with dt = 1 (paper, eq. 1-3):
    h = v + (x - v) / tau; spike = [h >= threshold]; v = h (1 - spike).

    The tests compare faster code with it: `_TorchLIF`, `backends.cupy_lif`, `fused.cpu.lif_`, and `charge`, `reset`,
    `current_gradient` in `fused.kernels.device`.

    Args:
        x: input current.
        v: membrane after the previous step; zeros at the start.
        h, spike: buffers for the membrane before the reset and the spikes.
    """
    h = torch.sub(x, v, out=h).div_(TAU).add_(v)
    spike = torch.ge(h, threshold, out=spike).to(x.dtype)
    return spike, h * (1 - spike)


class _TorchLIF(torch.autograd.Function):
    """Loop of `lif_step` over T. The backward pass keeps only h and equals autograd's bit for bit."""

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
        grad_v = None  # of the membrane between steps t and t + 1
        for t in reversed(range(len(h_seq))):
            over_threshold = h_seq[t] - ctx.threshold
            sigmoid = torch.sigmoid(over_threshold * ALPHA)
            grad_h = grad_spikes[t] * (1 - sigmoid) * sigmoid * ALPHA  # spikingjelly's order, for equal bits
            if grad_v is not None:
                grad_h.addcmul_(grad_v, (over_threshold < 0).to(grad_h.dtype))
            torch.div(grad_h, TAU, out=grad_x[t])
            grad_v = grad_h.sub_(grad_x[t])
        return grad_x, None


def torch_lif(x: Tensor, threshold: float) -> Tensor:
    """Map currents [T, ...] to spikes of LIF neurons, on any device, in any floating-point type."""
    return _TorchLIF.apply(x, threshold)


# LIF -> its membrane at the end of the last call, within `continued`
_membranes: ContextVar[dict[nn.Module, Tensor] | None] = ContextVar("membranes", default=None)


@contextlib.contextmanager
def continued(membranes: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Let every `LIF` start from its membrane in `membranes`, or from zero, and write the last one there.

    Other threads are not affected and can share a network.
    """
    token = _membranes.set(membranes)
    try:
        yield
    finally:
        _membranes.reset(token)


def is_continued() -> bool:
    """Return whether calls are within `continued`."""
    return _membranes.get() is not None


def is_transformed() -> bool:
    """Return whether the compiler, an exporter or torch.func transforms the call; they need plain operations."""
    is_in_func = torch._C._are_functorch_transforms_active()  # not public in torch
    return is_in_func or torch.compiler.is_compiling() or torch.jit.is_tracing()


class LIF(nn.Module):
    """Multi-step LIF neurons: currents [T, ...] to spikes [T, ...]. The membrane starts at zero, except in `continued`.

    With `leak_across_batch` the samples of a batch act as more time steps (order t*B + b). The last LIF of the released
    self-attention does so (`ssa_membrane="released"` of a network).
    """

    def __init__(self, threshold: float = THRESHOLD, leak_across_batch: bool = False, tau: float = TAU):
        super().__init__()
        require(tau >= 1, f"tau={tau}: must be at least 1")  # false for NaN, too
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
        """Return the membrane before the reset, from the current x and the membrane v after the previous step."""
        return v + (x - v) / self.tau

    def _over_time(self, x: Tensor) -> Tensor:
        membranes = None if torch.compiler.is_dynamo_compiling() else _membranes.get()  # dynamo has no ContextVar
        if membranes is None and type(self) is LIF and self.tau == TAU and not is_transformed():
            return self.function(x, self.threshold)
        spikes, v = self._steps(x, 0.0 if membranes is None else membranes.get(self, 0.0))
        if membranes is not None:
            membranes[self] = v
        return spikes

    def _steps(self, x: Tensor, v: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return spikes [T, ...] and the last membrane, step by step from membrane `v`."""
        spikes = []
        for x_t in x.split(1):  # [1, ...]; split and cat are one node each in exported graphs
            h = self.charge(x_t, v)
            spike = torch.ge(h, self.threshold).to(x.dtype)
            v = h * (1 - spike)
            if torch.is_grad_enabled() or torch.jit.is_tracing():  # torch checks traces without gradients
                surrogate = torch.sigmoid((h - self.threshold) * ALPHA)
                spike = spike + (surrogate - surrogate.detach())  # value of the spike, gradient of the surrogate
            spikes.append(spike)
        return torch.cat(spikes), v

    def __prepare_scriptable__(self) -> "LIF":
        raise TypeError("torch.jit.script: spiking neurons cannot be scripted; use torch.export or torch.jit.trace")

    def extra_repr(self) -> str:
        leak = ", leak_across_batch=True" if self.leak_across_batch else ""
        return f"threshold={self.threshold}, tau={self.tau}, function={self.function.__name__}{leak}"


class IF(LIF):
    """Integrate-and-fire neurons, without decay (spikingjelly's `IFNode`); see `LIF`."""

    def charge(self, x: Tensor, v: Tensor | float) -> Tensor:
        return v + x


class PLIF(LIF):
    """LIF neurons with one learned tau per layer, 1 / sigmoid(w) (spikingjelly's `ParametricLIFNode`); see `LIF`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        require(self.tau > 1, "tau=1: must be above 1 with neuron='plif'")
        self.w = nn.Parameter(torch.tensor(-math.log(self.tau - 1)))

    def charge(self, x: Tensor, v: Tensor | float) -> Tensor:
        return v + (x - v) * self.w.sigmoid()


NEURONS = {"lif": LIF, "if": IF, "plif": PLIF}


def set_neurons(model: nn.Module, kind: str, tau: float = TAU) -> None:
    """Replace every `LIF` of `model` by a neuron of `kind`, a key of `NEURONS`, and set its time constant."""
    require_choice("neuron", kind, NEURONS)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LIF):
                neuron = NEURONS[kind](child.threshold, child.leak_across_batch, tau)
                neuron.function = child.function
                setattr(module, name, neuron)
