"""Choice of backends: only this file sets the `function` of a `LIF` and the `fast_path` of a network."""

import functools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .fused import cpu, plan
from .fused.coverage import Coverage
from .neuron import ALPHA, LIF, TAU, THRESHOLD, is_continued, is_transformed, require, require_choice, torch_lif
from .qkformer import HierarchicalSpikingTransformer

CUPY_MAX_ELEMENTS = 2**31  # of T + 1 steps, because the CuPy kernels have 32-bit indices


@functools.cache
def _cupy_kernels(dtype: torch.dtype) -> tuple[Callable, Callable]:
    """Return spikingjelly's CUDA kernels of the forward and the backward pass."""
    from spikingjelly.activation_based import surrogate
    from spikingjelly.activation_based.auto_cuda.neuron_kernel import LIFNodeBPTTKernel, LIFNodeFPTTKernel

    ctype = {torch.float32: "float", torch.float16: "half2"}[dtype]
    slope = surrogate.Sigmoid(alpha=ALPHA).cuda_codes
    kernels = (
        LIFNodeFPTTKernel(decay_input=True, hard_reset=True, dtype=ctype),
        LIFNodeBPTTKernel(decay_input=True, surrogate_function=slope, hard_reset=True, detach_reset=True, dtype=ctype),
    )
    for kernel in kernels:
        kernel.check_ctypes = lambda arguments: None  # spikingjelly's needs numpy.int, removed in numpy 1.24
    return kernels


def cupy_lif(x: Tensor, threshold: float) -> Tensor:
    refusal = _cupy_refusal(x)
    require(refusal is None, f"lif_backend='cupy': {refusal}; use lif_backend='torch' or 'auto'")
    from spikingjelly.activation_based.auto_cuda.neuron_kernel import LIFNodeATGF

    x_seq = x.flatten(1)
    spikes, _ = LIFNodeATGF.apply(x_seq, torch.zeros_like(x_seq[0]), threshold, 0.0, 1 / TAU, *_cupy_kernels(x.dtype))
    return spikes.view(x.shape)


def _cupy_refusal(x: Tensor) -> str | None:
    if not x.is_cuda:
        return f"needs its input on a CUDA device, got {x.device}"
    if x.dtype not in (torch.float16, torch.float32):
        return f"computes in float16 or float32, got {x.dtype}"
    if x.numel() + x[0].numel() > CUPY_MAX_ELEMENTS:
        return f"indexes up to 2^31 elements in T + 1 steps, got {x.numel():,} in T (input {tuple(x.shape)})"
    return None


def triton_lif(x: Tensor, threshold: float) -> Tensor:
    from .fused import autograd

    is_ready = x.is_cuda or autograd.interpreted()
    require(is_ready, f"lif_backend='triton': needs its input on a CUDA device, got {x.device}; use 'torch' or 'auto'")
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return autograd.lif(x, threshold)


def _problem(test: Callable[[], str | None], package: str) -> str | None:
    """Run the test of a backend; return its problem with a fix, or None if the backend runs."""
    try:
        problem = test()
    except ImportError as error:
        return f"needs {package} ({error}); install it, or use lif_backend='torch'"
    except Exception as error:  # a broken installation may raise anything
        problem = f"does not launch ({type(error).__name__}: {error})"
    return problem and f"{problem}; use lif_backend='torch'"


def _test_cupy() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device (torch sees none)"
    import cupy  # noqa: F401

    x = torch.linspace(-1, 3, 64, device="cuda").reshape(4, 16)
    return None if torch.equal(cupy_lif(x, THRESHOLD), torch_lif(x, THRESHOLD)) else "gives wrong spikes on this device"


def _test_triton() -> str | None:
    from .fused import autograd, selftest

    if autograd.interpreted():
        return None
    return selftest.problem("cuda") if torch.cuda.is_available() else "needs a CUDA device (torch sees none)"


cupy_problem = functools.cache(functools.partial(_problem, _test_cupy, "cupy-cuda13x==14.2.0"))
triton_problem = functools.cache(functools.partial(_problem, _test_triton, "triton==3.6.0"))


@functools.cache
def launches(backend: str) -> bool:
    """Return whether "triton" or "cupy" runs in this process; warn if it does not."""
    problem = {"triton": triton_problem, "cupy": cupy_problem}[backend]()
    if problem:
        warnings.warn(f"lif_backend='auto': runs without {backend}, which {problem}", stacklevel=2)
    return problem is None


def auto_lif(x: Tensor, threshold: float) -> Tensor:
    """Compute one layer of neurons with the first backend that runs; `FastPath` chooses for whole networks."""
    if not x.is_cuda:
        return torch_lif(x, threshold)
    if launches("triton"):
        return triton_lif(x, threshold)
    return (cupy_lif if launches("cupy") and _cupy_refusal(x) is None else torch_lif)(x, threshold)


BACKENDS = {"auto": auto_lif, "torch": torch_lif, "cupy": cupy_lif, "triton": triton_lif}


class FastPath:
    """Callable that yields a network's stage outputs in fused steps; it returns None if the modules must compute."""

    coverage: Coverage | None = None

    def __reduce__(self) -> tuple:
        return FastPath, ()  # drops the coverage, which refers to the network's modules

    def covered(self, model: HierarchicalSpikingTransformer) -> Coverage:
        """Return the cached coverage, or a new one if the network has changed."""
        coverage = self.coverage
        if coverage is None or not coverage.holds(model.stages):
            coverage = self.coverage = Coverage(model)  # one assignment: threads may share a network
        return coverage

    def __call__(self, model: HierarchicalSpikingTransformer, x: Tensor) -> Iterator[Tensor] | None:
        if model.residual != "sew" or is_transformed() or is_continued():
            return None
        covered, ops = self.covered(model), None
        if covered.function is triton_lif or (covered.function is auto_lif and x.is_cuda and launches("triton")):
            from .fused import autograd, gpu  # late, because they import Triton

            ops = gpu if x.device.type != "cpu" or autograd.interpreted() else None
        elif covered.function is auto_lif and x.device.type == "cpu" and not covered.trains:
            ops = None if torch.is_grad_enabled() else cpu
        if ops is None or not x.numel():
            return None
        return plan.stage_outputs(model, x, ops, model.spike_packing and model.training and not covered.drops)


def set_lif_backend(model: nn.Module, backend: str) -> None:
    """Set the backend of every LIF in `model`; raise `ValueError` with a fix if it cannot run.

    Args:
        model: any module with `LIF`s.
        backend: "torch" (any device and floating dtype; the reference), "cupy" (spikingjelly's CUDA kernels; float16
            and float32), "triton" (see `models.fused`), or "auto": on CUDA the first of triton, cupy and torch that
            runs; elsewhere torch, and in evaluation on a CPU `fused.cpu`.
    """
    require_choice("lif_backend", backend, BACKENDS)
    problem = {"cupy": cupy_problem, "triton": triton_problem}.get(backend, lambda: None)()
    require(problem is None, f"lif_backend={backend!r}: {problem}")
    for module in model.modules():
        if isinstance(module, LIF):
            module.function = BACKENDS[backend]
        elif isinstance(module, HierarchicalSpikingTransformer):
            module.fast_path = FastPath() if backend in ("auto", "triton") else None
