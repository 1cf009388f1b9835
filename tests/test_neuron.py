"""LIF neuron, by hand and against spikingjelly, and the choice of its backend."""

import sys

import pytest
import torch
from scripts import refuses
from spikingjelly import configure
from spikingjelly.activation_based import neuron as sj_neuron
from spikingjelly.activation_based import surrogate as sj_surrogate
from torch._subclasses.fake_tensor import FakeTensorMode

from models import LIF, backends, set_lif_backend
from models.neuron import lif_step, set_neurons, torch_lif

SPIKINGJELLY = {  # kind -> its class and arguments
    "lif": (sj_neuron.LIFNode, {"tau": 1.5}),
    "if": (sj_neuron.IFNode, {}),
    "plif": (sj_neuron.ParametricLIFNode, {"init_tau": 3.0}),
}
DETACHED = {"detach_reset": True, "step_mode": "m", "surrogate_function": sj_surrogate.Sigmoid(4.0)}
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without CUDA")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
#          charge h:  .625    .9375   1.46875  .25    1.0     -.5    .5
CURRENT = [1.25, 1.25, 2.0, 0.5, 1.75, -1.0, 1.5]
MEMBRANE = [0.625, 0.9375, 0.0, 0.25, 0.0, -0.5, 0.5]  # after the reset
SPIKES = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]  # the second spike: h equals the threshold exactly


def run(lif, x, threshold, grad):
    x = x.clone().requires_grad_()
    spikes = lif(x, threshold)
    spikes.backward(grad)
    return spikes.detach(), x.grad


def currents(steps, dtype=torch.float32, shape=(3, 5, 7)):
    g = torch.Generator().manual_seed(steps)
    x, grad = torch.randn(2, steps, *shape, generator=g)
    return (1.5 * x + 0.7).to(dtype), grad.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_membrane_trace_by_hand(dtype):
    v = torch.zeros(1, dtype=dtype)
    for current, membrane, spike in zip(CURRENT, MEMBRANE, SPIKES, strict=True):
        out, v = lif_step(torch.tensor([current], dtype=dtype), v)
        assert (out.item(), v.item()) == (spike, membrane)
    x = torch.tensor(CURRENT, dtype=dtype)[:, None]
    assert LIF()(x).flatten().tolist() == SPIKES
    assert LIF(threshold=0.5)(x).flatten().tolist() == [1, 1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("kind", SPIKINGJELLY)
def test_other_neurons_equal_spikingjelly(kind):
    node, arguments = SPIKINGJELLY[kind]
    expected = node(**arguments, **DETACHED).double()
    model = torch.nn.Sequential(LIF())
    set_neurons(model, kind, *arguments.values())
    actual = model.double()[0]
    x, grad = currents(5, torch.float64)
    runs = [run(lambda x, _, neuron=neuron: neuron(x), x, None, grad) for neuron in (actual, expected)]
    assert runs[0][0].mean() > 0.1
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], torch_lif(x, 1.0))
    learned = [[p.grad for p in neuron.parameters()] for neuron in (actual, expected)]
    assert len(learned[0]) == (kind == "plif")
    assert learned[0] == learned[1]


@pytest.mark.parametrize(("kind", "tau"), [("lif", 0.5), ("lif", float("nan")), ("plif", 1.0)])
def test_a_tau_out_of_range_is_refused(kind, tau):
    with refuses("tau"):
        set_neurons(torch.nn.Sequential(LIF()), kind, tau)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [1.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_torch_backend_is_bit_equal_to_spikingjelly(steps, threshold, dtype):
    x, grad = currents(steps, dtype)
    node = sj_neuron.LIFNode(tau=2.0, v_threshold=threshold, **DETACHED)
    actual, expected = (run(lif, x, threshold, grad) for lif in (torch_lif, lambda x, _: node(x)))
    assert actual[0].mean() > 0.1
    assert actual[0].dtype == actual[1].dtype == dtype
    assert all(map(torch.equal, actual, expected))


def test_one_tensor_is_kept_for_the_backward_pass():
    x, kept = currents(4)[0].requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        LIF()(x)
    assert kept == [x.numel()]


def test_leak_across_batch_runs_time_major():
    x, _ = currents(4)
    one_sequence = torch_lif(x.reshape(12, 1, 5, 7), 1.0).reshape(x.shape)
    assert torch.equal(LIF(leak_across_batch=True)(x), one_sequence)
    assert not torch.equal(LIF()(x), one_sequence)


@pytest.mark.parametrize("backend", ["cuda", pytest.param("cupy", marks=NO_GPU)])
def test_a_backend_that_cannot_run_is_reported(backend):
    with refuses(repr(backend)):
        set_lif_backend(LIF(), backend)


@pytest.mark.parametrize(
    ("device", "dtype", "steps", "elements", "value"),
    [
        ("cpu", torch.float32, 4, 2, "cpu"),
        ("cuda", torch.bfloat16, 4, 2, "torch.bfloat16"),
        ("cuda", torch.float16, 3, 2**29, None),
        ("cuda", torch.float16, 3, 2**29 + 1, "1,610,612,739"),  # the step after the last needs an index, too
    ],
)
def test_cupy_refuses_what_it_would_get_wrong(device, dtype, steps, elements, value):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(steps, elements, device=device, dtype=dtype)
        if value is None:
            assert backends._cupy_refusal(x) is None
        else:
            with refuses(value):
                backends.cupy_lif(x, 1.0)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_cupy_kernels_compile(dtype, architecture):
    pytest.importorskip("cupy")
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda import nvrtc

    options = assemble_cupy_compiler_options(configure.cuda_compiler_options)
    for kernel in backends._cupy_kernels(dtype):
        program = nvrtc.createProgram(kernel.full_codes, "lif.cu", (), ())
        nvrtc.compileProgram(program, [*options, f"-arch=sm_{architecture}"])
        assert kernel.kernel_name.encode() in nvrtc.getCUBIN(program)


def test_missing_cupy_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "cupy_problem", backends.cupy_problem.__wrapped__)  # without its cache
    monkeypatch.setitem(sys.modules, "cupy", None)
    with refuses("cupy-cuda13x==14.2.0"):
        set_lif_backend(LIF(), "cupy")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.float32, 1e-5)])  # of fast-math kernels
@pytest.mark.parametrize("threshold", [1.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_cupy_equals_torch(steps, threshold, dtype, tolerance):
    x, grad = (t.cuda() for t in currents(steps, dtype))
    expected, actual = (run(backends.BACKENDS[name], x, threshold, grad) for name in ("torch", "cupy"))
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "working", "chosen"),
    [
        (torch.float32, ["triton", "cupy"], "triton"),
        (torch.float32, ["cupy"], "cupy"),
        (torch.float32, [], "torch"),
        (torch.bfloat16, ["cupy"], "torch"),
    ],
)
def test_auto_takes_the_first_backend_that_runs(dtype, working, chosen, monkeypatch):
    assert backends.triton_problem() is None
    assert backends.cupy_problem() is None
    monkeypatch.setattr(backends, "launches", lambda backend: backend in working)
    x, grad = (t.cuda() for t in currents(4, dtype))
    actual, expected = (run(backends.BACKENDS[name], x, 1.0, grad) for name in ("auto", chosen))
    assert all(map(torch.equal, actual, expected))
