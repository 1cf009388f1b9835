"""spikingjelly's CUDA kernels without a device: they compile, and their arguments fit them."""

import contextlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from spikingjelly import configure
from spikingjelly.activation_based import cuda_utils
from spikingjelly.activation_based.auto_cuda import base, neuron_kernel
from torch._subclasses.fake_tensor import FakeTensorMode

from models import backends

pytest.importorskip("cupy")
DTYPES = [torch.float16, torch.float32]


class HostArray(np.ndarray):
    """A CuPy array that lies in host memory."""

    device = SimpleNamespace(id=-1)  # torch's number of the CPU


@pytest.fixture
def launched(monkeypatch):
    """Keep CuPy from the device; returns the names of the kernels whose launch had fitting arguments."""
    names = []

    class RawKernel:
        def __init__(self, source, name, options, backend):
            self.name = name
            self.parameters = re.search(rf"{name}\((.*?)\)", source, re.DOTALL)[1].split(",")

        def __call__(self, grid, block, arguments):
            for parameter, argument in zip(self.parameters, arguments, strict=True):
                ctype, kind = re.match(r"\s*(?:const )?(\w+) ([*&])", parameter).groups()
                if kind == "*":
                    assert isinstance(argument, int)
                else:
                    assert argument.view(np.ndarray).dtype == {"int": int, "float": "f4", "half2": "f2"}[ctype]
                    assert argument.size == (2 if ctype == "half2" else 1)
            names.append(self.name)

    arrays = SimpleNamespace(
        ndarray=HostArray,
        RawKernel=RawKernel,
        asarray=lambda value, dtype=None: np.asarray(value, dtype).view(HostArray),
        ascontiguousarray=lambda array: array,
    )
    for module in (base, neuron_kernel):
        monkeypatch.setattr(module, "cupy", arrays)
    monkeypatch.setattr(cuda_utils, "DeviceEnvironment", contextlib.nullcontext)
    monkeypatch.setattr(backends, "_cupy_refusal", lambda x: None)
    return names


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_compile(dtype, architecture):
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda import nvrtc

    options = assemble_cupy_compiler_options(configure.cuda_compiler_options)
    for kernel in backends._cupy_kernels(dtype):
        program = nvrtc.createProgram(kernel.full_codes, "lif.cu", (), ())
        nvrtc.compileProgram(program, [*options, f"-arch=sm_{architecture}"])
        assert kernel.kernel_name.encode() in nvrtc.getCUBIN(program)


@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (1, 2, 4)])  # half2 takes neurons in pairs: 105 are padded
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_passes_launch(dtype, shape, launched):
    x = torch.randn(shape).to(dtype).requires_grad_()
    spikes = backends.BACKENDS["cupy"](x, 1.0)
    assert (spikes.shape, spikes.dtype) == (x.shape, dtype)
    spikes.sum().backward()
    assert (x.grad.shape, x.grad.dtype) == (x.shape, dtype)
    assert launched == [kernel.kernel_name for kernel in backends._cupy_kernels(dtype)]


@pytest.mark.parametrize(("elements", "is_refused"), [(2**29, False), (2**29 + 1, True)])
def test_the_step_after_the_last_has_an_index(elements, is_refused):
    with FakeTensorMode():
        x = torch.empty(3, elements, device="cuda")
    assert (backends._cupy_refusal(x) is not None) == is_refused
