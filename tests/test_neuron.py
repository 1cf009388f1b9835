"""The LIF neuron: by hand, against a plain loop, and against spikingjelly."""

import pytest
import torch
from scripts import refuses
from spikingjelly.activation_based import neuron as sj_neuron
from spikingjelly.activation_based import surrogate as sj_surrogate
from torch._subclasses.fake_tensor import FakeTensorMode

from models import LIF, backends, set_lif_backend
from models.neuron import lif_step, spike_backward, torch_lif

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
#          charge h:  .625    .9375   1.46875  .25    1.0     -.5    .5
CURRENT = [1.25, 1.25, 2.0, 0.5, 1.75, -1.0, 1.5]
MEMBRANE = [0.625, 0.9375, 0.0, 0.25, 0.0, -0.5, 0.5]  # behind the reset
SPIKES = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]  # the second spike: h equals the threshold exactly


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, over_threshold):
        ctx.save_for_backward(over_threshold)
        return (over_threshold >= 0).to(over_threshold)

    @staticmethod
    def backward(ctx, grad):
        return spike_backward(grad, *ctx.saved_tensors)


def plain_loop(x, threshold):
    v, spikes = torch.zeros_like(x[0]), []
    for t in range(len(x)):
        h = v + (x[t] - v) / 2
        spikes.append(_Spike.apply(h - threshold))
        v = h * (1 - spikes[-1].detach())
    return torch.stack(spikes)


def spikingjelly(x, threshold):
    node = sj_neuron.LIFNode(
        tau=2.0, v_threshold=threshold, detach_reset=True, step_mode="m", surrogate_function=sj_surrogate.Sigmoid(4.0)
    )
    return node(x)


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


def test_gradient_by_hand():
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64, requires_grad=True)  # h = .5 silent, then 1.75 fires
    LIF()(x).sum().backward()
    slope = [4 * s * (1 - s) for s in torch.sigmoid(4 * torch.tensor([-0.5, 0.75], dtype=torch.float64))]
    torch.testing.assert_close(x.grad.flatten(), torch.stack([slope[0] / 2 + slope[1] / 4, slope[1] / 2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [1.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_torch_backend_is_bit_equal_to_the_plain_loop(steps, threshold, dtype):
    x, grad = currents(steps, dtype)
    for actual, expected in zip(run(torch_lif, x, threshold, grad), run(plain_loop, x, threshold, grad), strict=True):
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("threshold", [1.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_torch_backend_is_bit_equal_to_spikingjelly(steps, threshold):
    x, grad = currents(steps)
    ours, theirs = run(torch_lif, x, threshold, grad), run(spikingjelly, x, threshold, grad)
    assert ours[0].mean() > 0.1
    assert all(map(torch.equal, ours, theirs))


def test_any_memory_layout():
    x, grad = currents(4, shape=(2, 6, 3, 5))
    spikes, grad_x = run(torch_lif, x, 1.0, grad)
    for i, j in ((0, 1), (2, 4)):
        layout = x.transpose(i, j).contiguous().transpose(i, j)
        actual = run(torch_lif, layout, 1.0, grad)
        assert torch.equal(actual[0], spikes)
        torch.testing.assert_close(actual[1], grad_x)


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


def test_unknown_backend_is_named():
    with refuses("'cuda'"):
        set_lif_backend(LIF(), "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without CUDA")
def test_cupy_without_a_device_says_what_to_do():
    with refuses("'cupy'"):
        set_lif_backend(LIF(), "cupy")
    with refuses("cpu"):
        backends.BACKENDS["cupy"](torch.zeros(2, 3), 1.0)


def test_cupy_refuses_what_it_would_get_wrong():
    with FakeTensorMode(allow_non_fake_inputs=True):
        too_large = torch.empty(4, 2**29, device="cuda", dtype=torch.float16)
        with refuses("2,147,483,648"):
            backends.BACKENDS["cupy"](too_large, 1.0)
        with refuses("torch.bfloat16"):
            backends.BACKENDS["cupy"](torch.empty(4, 2, device="cuda", dtype=torch.bfloat16), 1.0)


def test_cupy_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    backends.cupy_problem.cache_clear()
    try:
        with refuses("cupy-cuda13x==14.2.0"):
            set_lif_backend(LIF(), "cupy")
    finally:
        backends.cupy_problem.cache_clear()


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
