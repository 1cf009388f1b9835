"""Fused path against the modules: each kernel, whole networks, and compilation of every launch.

Without a GPU Triton's interpreter runs the kernels. It accepts what the compiler may reject, so that the launches of
whole networks at their true sizes are compiled as well.
"""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from scripts import ROOT
from torch import nn

from benchmarks.turns import kept_bytes
from models import backends, create_model, neuron, set_lif_backend
from models.attention import SpikingSelfAttention, TokenQKAttention
from models.fused import autograd, selftest
from models.fused.autograd import Unit
from models.fused.kernels import bn_lif, launch, linear_lif, packing, pool, self_attention
from models.fused.kernels.bn_stats import Norm, norm_of
from models.layers import SpikingConv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64
TOLERANCE = {HALF: 2e-3, SINGLE: 5e-6}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """Launch few large programs, because the interpreter's time grows with their number."""
    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "PROGRAMS", 3)
        monkeypatch.setattr(launch, "WARPS", 64)
        monkeypatch.setattr(bn_lif, "CHUNK", 4)


def random(*shape, dtype=DOUBLE, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=rng, dtype=DOUBLE) * scale).to(DEVICE, dtype)


def lively(module, seed=0):
    """Set BatchNorms of either sign that make a quarter of the neurons fire, and effective convolution biases."""
    for i, m in enumerate(module.modules()):
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            n = m.num_features
            m.weight.data = (random(n, seed=seed + i) * 0.3 + 1.2) * torch.where(random(n, seed=i) < -0.8, -1, 1)
            m.bias.data = random(n, seed=seed + i + 1, scale=0.3) + 0.3
            m.running_mean = random(n, seed=seed + i + 2, scale=0.1)
            m.running_var = random(n, seed=seed + i + 3).abs() + 0.5
        elif isinstance(m, nn.Conv1d | nn.Conv2d) and m.bias is not None:
            m.bias.data = random(len(m.bias), seed=seed + i)
    return module.double().to(DEVICE)


def close(actual, expected, dtype):
    """Assert equality up to the rounding of `dtype`, relative to the largest entry."""
    atol = TOLERANCE[dtype] * expected.abs().max().item() + 1e-30
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("steps", [1, 4, 16, 18])
@pytest.mark.parametrize("threshold", [neuron.THRESHOLD, neuron.ATTN_THRESHOLD])
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_neurons(steps, threshold, dtype):
    x = random(steps, 3, 5, 8, dtype=dtype, scale=2).requires_grad_()
    reference = x.detach().float().requires_grad_()
    actual, expected = autograd.lif(x, threshold), neuron.torch_lif(reference, threshold)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected.to(dtype))
    assert 0.1 < expected.mean() < 0.9
    grad = random(*x.shape, dtype=dtype, seed=1)
    actual.backward(grad)
    expected.backward(grad.to(expected.dtype))
    close(x.grad, reference.grad, dtype)


def margin(u, threshold=neuron.THRESHOLD):
    """Return the smallest distance of a membrane to the threshold; rounding decides about smaller ones."""
    v, nearest = torch.zeros_like(u[0]), torch.inf
    for current in u.detach():
        h = v + (current - v) / 2
        nearest = min(nearest, (h - threshold).abs().min().item())
        v = torch.where(h >= threshold, 0, h)
    return nearest


def undecided_by_rounding(currents):
    """Return the first seed whose `currents(seed)`, a list, stay away from the threshold."""
    return next(seed for seed in range(100) if all(margin(u) > 1e-5 for u in currents(seed)))


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(
    ("steps", "static", "pool", "leak", "train"),
    [
        (1, False, False, False, True),
        (4, False, False, False, True),
        (4, False, False, False, False),
        (4, True, True, False, True),
        (16, False, True, False, True),
        (3, True, False, False, True),
        (3, False, True, False, False),
        (2, False, False, True, True),  # 8 steps, T * B
    ],
)
def test_unit(dtype, steps, static, pool, leak, train):
    batch, size, channels = 4, (5, 6), 35
    m = lively(SpikingConv(3, channels, kernel_size=3, bias=True, pool=pool, leak_across_batch=leak)).train(train)
    set_lif_backend(m, "torch")
    actual, reference = copy.deepcopy(m).float(), copy.deepcopy(m)

    def input_of(seed):
        return random(1 if static else steps, batch, channels, *size, dtype=dtype, seed=seed)

    def current(network, y):
        """Return the neurons' input, from the output of a convolution without its bias."""
        shown = (y + m.conv.bias.detach().view(-1, 1, 1)).expand(steps, *y.shape[1:])
        u = network.pool(network.bn(shown.flatten(0, 1))).unflatten(0, shown.shape[:2])
        return u.flatten(0, 1) if leak else u

    seed = undecided_by_rounding(lambda seed: [current(copy.deepcopy(m), input_of(seed).double())])
    y = input_of(seed).requires_grad_()
    z = input_of(seed).double().requires_grad_()
    u = current(reference, z)
    add = random(*u.unflatten(0, (steps, batch)).shape if leak else u.shape, seed=6).round()
    grad = random(*add.shape, seed=5)
    fired = neuron.torch_lif(u, neuron.THRESHOLD).view_as(add)
    expected = fired + add
    expected.backward(grad)
    unit = Unit((Norm(actual.bn, actual.conv.bias),), steps, pool, leak)
    rows = y.permute(0, 1, 3, 4, 2)
    spikes = autograd.norm_lif_of(rows, unit, add.to(dtype).permute(0, 1, 3, 4, 2))
    spikes.backward(grad.to(dtype).permute(0, 1, 3, 4, 2))
    assert torch.equal(spikes.permute(0, 1, 4, 2, 3).double(), expected)
    assert 0.02 < fired.mean() < 0.6
    close(y.grad, z.grad, dtype)
    for name in ("weight", "bias"):
        close(getattr(actual.bn, name).grad, getattr(reference.bn, name).grad, dtype)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        close(getattr(actual.bn, name), getattr(reference.bn, name), SINGLE)
    if train:
        assert not actual.conv.bias.grad.any()  # BatchNorm cancels it
    else:
        close(actual.conv.bias.grad, z.grad.sum((0, 1, 3, 4)), dtype)


@pytest.mark.parametrize("gamma", [1.0, -1.0, 0.0])
def test_pooling_passes_nan_on(gamma):
    y = random(2, 5, 6, 4)
    y[0, 2, 3, 1] = torch.nan
    norm = torch.tensor([0.0, 1.0, gamma, 0.0], dtype=DOUBLE, device=DEVICE)[:, None].expand(4, 4).contiguous()
    pooled, _ = pool.forward(y, norm, index=False)
    expected = nn.functional.max_pool2d((gamma * y).permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
    assert expected.isnan().any()
    torch.testing.assert_close(gamma * pooled, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("steps", "heads", "width"), [(1, 3, 16), (4, 8, 12), (16, 2, 8)])
@pytest.mark.parametrize("train", [True, False])
def test_token_attention(dtype, steps, heads, width, train):
    channels = heads * width
    m = lively(TokenQKAttention(channels, heads)).train(train)
    m.q.bn.bias.data.view(heads, width)[::2] -= 0.6  # the sum decides here, and a neighbour that always fires
    m.q.bn.bias.data.view(heads, width)[1::2, 0] += 2.5  # must not count where a head does not fill its tile
    set_lif_backend(m, "torch")
    actual = copy.deepcopy(m).float()

    def currents(network, y):
        return [
            unit.bn(part.flatten(2, 3).mT.flatten(0, 1)).unflatten(0, (steps, 2))
            for unit, part in zip((network.q, network.k), y.split(channels, -1), strict=True)
        ]

    def input_of(seed):
        return random(steps, 2, 3, 5, 2 * channels, dtype=dtype, seed=seed)

    seed = undecided_by_rounding(lambda seed: currents(copy.deepcopy(m), input_of(seed).double()))
    y = input_of(seed).requires_grad_()
    z = input_of(seed).double().requires_grad_()
    q, k = (neuron.torch_lif(u, neuron.THRESHOLD).unflatten(2, (heads, -1)) for u in currents(m, z))
    expected = m.attend(q, k).flatten(2, 3).mT.unflatten(2, (3, 5))
    output = autograd.token_attention_of(y, Unit((Norm(actual.q.bn, None), Norm(actual.k.bn, None)), steps), heads)
    assert torch.equal(output.double(), expected)
    assert 0.02 < expected.mean() < 0.6
    grad = random(*expected.shape, seed=2)
    expected.backward(grad)
    output.backward(grad.to(dtype))
    close(y.grad, z.grad, dtype)
    for name, parameter in m.named_parameters():
        if ".bn." in name and not name.startswith("proj"):
            close(actual.get_parameter(name).grad, parameter.grad, dtype)
    for name in ("q.bn.running_var", "k.bn.running_var"):
        close(actual.get_buffer(name), m.get_buffer(name), SINGLE)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(
    ("steps", "heads", "width", "tokens", "rate"),
    [(1, 2, 16, (7, 11), 0.15), (4, 3, 12, (5, 5), 0.2), (16, 2, 8, (2, 3), 0.4)],
)
def test_self_attention(dtype, steps, heads, width, tokens, rate):
    m = SpikingSelfAttention(heads * width, heads)
    set_lif_backend(m, "torch")
    s = torch.rand((steps, 2, *tokens, 3 * heads * width), generator=torch.Generator().manual_seed(0)) < rate
    s = s.to(DEVICE, dtype).requires_grad_()
    z = s.detach().double().requires_grad_()
    parts = z.flatten(2, 3).unflatten(3, (3, heads, width)).permute(3, 0, 1, 4, 5, 2)
    expected = m.attend(*parts).permute(0, 1, 4, 2, 3).reshape(steps, 2, *tokens, -1)
    actual = autograd.self_attention_of(s, heads, m.scale)
    assert torch.equal(actual.double(), expected)
    assert 0.02 < expected.mean() < 0.98
    grad = random(*expected.shape, seed=2)
    expected.backward(grad)
    actual.backward(grad.to(dtype))
    close(s.grad, z.grad, dtype)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(("steps", "width", "channels"), [(1, 48, 96), (4, 70, 40), (16, 64, 35)])
def test_convolution_in_one_kernel(dtype, steps, width, channels):
    m = lively(SpikingConv(width, channels, bias=True)).eval()
    m.conv.weight.data = (m.conv.weight.data * 64).round() / 16  # exact in half precision, and so are their sums
    set_lif_backend(m, "torch")
    x = (random(steps, 2, width, 7, 9) > 0.8).double()
    add = random(steps, 2, channels, 7, 9, seed=1).round()
    expected = m(x) + add
    norm, count = norm_of(x.new_empty((0, channels), dtype=dtype), [Norm(m.bn, m.conv.bias)], 1)
    assert count is None
    rows = [v.permute(0, 1, 3, 4, 2).flatten(1, 3).to(dtype).contiguous() for v in (x, add)]
    actual = linear_lif.forward(rows[0], m.conv.weight.flatten(1).to(dtype), norm, rows[1], neuron.THRESHOLD)
    assert torch.equal(actual.view(steps, 2, 7, 9, -1).permute(0, 1, 4, 2, 3).double(), expected)
    assert 0.02 < (expected - add).mean() < 0.6


@pytest.mark.parametrize("size", [1, 8, 9, 20_003])
def test_bits(size):
    spikes = (random(size) > 0.3).half()
    bits = packing.pack(spikes)
    assert bits.numel() == -(-size // 8)
    assert torch.equal(packing.unpack(bits, size, HALF), spikes)


CIFAR = {"width": 32, "depths": (1, 1), "attention": ("token", "self"), "time_steps": 2}
NETWORKS = {
    "cifar": ("qkformer_4_384", CIFAR | {"time_steps": 4}, (2, 3, 6, 8)),
    "released": ("qkformer_4_384", CIFAR | {"ssa_membrane": "released"}, (3, 3, 6, 8)),
    "imagenet": ("qkformer_10_384", CIFAR | {"heads": 4, "num_classes": 7}, (2, 3, 33, 50)),
    "once": ("qkformer_4_384", CIFAR | {"time_steps": 1}, (2, 3, 8, 8)),
    "channel": ("qkformer_4_384", CIFAR | {"attention": ("channel", "self")}, (2, 3, 8, 8)),
    "no_shortcut": ("qkformer_10_384", CIFAR | {"heads": 4, "shortcut": False}, (2, 3, 32, 32)),
    "events": ("qkformer_2_256", {"width": 32, "heads": 4}, (2, 16, 2, 16, 16)),
    "long": ("qkformer_2_256", {"width": 32, "heads": 4}, (1, 18, 2, 16, 16)),
}
TINY = {"width": 16, "depths": (1,), "attention": ("token",), "heads": 2, "mlp_ratio": 1}  # fewest kernels
QUICK = ("released", "imagenet")
BY_NAME = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NETWORKS]


def network_of(name, **more):
    kind, arguments, shape = NETWORKS[name]
    torch.manual_seed(0)
    return lively(create_model(kind, **arguments | more)), random(*shape, seed=9)


def step(network, x, backend, ranks=None):
    """Return logits after a backward pass, with random loss weights for each sample of all `ranks`."""
    set_lif_backend(network, backend)
    logits = network(x)
    weights = [random(n, logits.shape[1], seed=3) for n in ranks or [len(logits)]]
    (logits * torch.cat(weights)).sum().backward()
    return logits


def gradients_of(network):
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_trained_alike(gradients, buffers, reference):
    """Assert that gradients and buffers, by name, are those of a network in float64."""
    largest = max(p.grad.abs().max() for p in reference.parameters())
    for name, gradient in gradients_of(reference).items():
        scale = max(gradient.abs().max(), 1e-3 * largest)
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-9 * scale, msg=name)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", BY_NAME)
def test_training_of_whole_networks(name):
    reference, x = network_of(name)
    network = copy.deepcopy(reference)
    expected, actual = step(reference, x, "torch"), step(network, x, "triton")
    assert expected.std() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert_trained_alike(gradients_of(network), dict(network.named_buffers()), reference)


def uneven_rank(rank, folder, network, x):
    """Save the gradients of one of two ranks, which take 1 and 3 samples."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network = copy.deepcopy(network)  # its memory is shared by the ranks
    step(torch.nn.SyncBatchNorm.convert_sync_batchnorm(network), x[:1] if rank == 0 else x[1:], "triton")
    assert network.fast_path.covered(network).function is backends.triton_lif
    torch.save((gradients_of(network), dict(network.named_buffers())), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks share no GPU")
def test_ranks_with_different_numbers_of_samples_share_statistics(tmp_path):
    network, _ = network_of("once", **TINY)
    x = random(4, 3, 8, 8, seed=9)
    torch.multiprocessing.spawn(uneven_rank, (tmp_path, network, x), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    step(network, x, "torch", [1, 3])
    total = {name: sum(gradients[name] for gradients, _ in ranks) for name, _ in network.named_parameters()}
    for _, buffers in ranks:
        assert_trained_alike(total, buffers, network)


@pytest.mark.parametrize(("name", "backend"), [(name, "auto") for name in NETWORKS] + [("released", "triton")])
def test_evaluation_of_whole_networks(name, backend):
    """Compare "auto" too, which folds BatchNorm on a CPU."""
    network, x = network_of(name)
    network.eval()
    set_lif_backend(network, "torch")
    with torch.no_grad():
        expected = network(x)
        set_lif_backend(network, backend)
        actual = network(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_half_precision_follows_the_modules():
    """Allow a few other spikes: logits must be as close to float64 as the modules' in half precision."""
    network, x = network_of("released")
    network.eval()
    set_lif_backend(network, "torch")
    with torch.no_grad():
        exact, expected = network(x), copy.deepcopy(network).half()(x.half())
        set_lif_backend(network, "triton")
        actual = network.half()(x.half())
    assert actual.dtype == HALF
    assert (actual - exact).norm() < 2 * (expected - exact).norm() + 1e-2 * exact.norm()


def test_packing_and_checkpointing_change_nothing(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    network, x = network_of("once", **TINY)
    sizes, results = [], []
    monkeypatch.setattr(packing, "pack", lambda spikes, pack=packing.pack: sizes.append(len(spikes)) or pack(spikes))
    for enable in (False, True):
        trained = copy.deepcopy(network)
        trained.set_spike_packing(enable)
        trained.set_grad_checkpointing(enable)
        step(trained, x, "triton")
        results.append([*(p.grad for p in trained.parameters()), *trained.buffers()])
        assert bool(sizes) == enable
    assert all(map(torch.equal, *results))


def test_the_fused_path_keeps_less():
    network, x = network_of("once", **TINY)
    set_lif_backend(network, "torch")
    plain = kept_bytes(lambda: network(x), network.parameters())
    set_lif_backend(network, "triton")
    assert kept_bytes(lambda: network(x), network.parameters()) < 0.7 * plain


def test_stochastic_depth_trains_and_is_not_packed(monkeypatch):
    network, x = network_of("once", **TINY)
    network.set_spike_packing(True)
    network.stages[0].blocks[0].drop_path.rate = 0.5
    with pytest.raises(ValueError, match="drop_path"):
        network.set_spike_packing(True)
    monkeypatch.setattr(packing, "pack", None)
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(1)
        results.append(step(copy.deepcopy(network), x, backend))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_the_compiler_gets_the_modules():
    network, x = network_of("once", **TINY)
    network.eval()
    set_lif_backend(network, "torch")
    compiled = copy.deepcopy(network)
    set_lif_backend(compiled, "triton")
    compiled.compile(backend="eager", fullgraph=True)
    expected = network(x)
    assert expected.std() > 1e-3
    assert torch.equal(compiled(x), expected)


def test_a_network_in_evaluation_that_learns_its_statistics():
    network, x = network_of("once", **TINY)
    network = network.eval().half()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    set_lif_backend(network, "triton")
    with torch.no_grad():
        assert network(x.half()).isfinite().all()
    assert all(buffer.isfinite().all() for buffer in network.buffers())
    assert network.stages[0].embed.units[0].bn.num_batches_tracked == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(autograd, "interpreted", lambda: False)
    monkeypatch.setattr(backends, "triton_problem", backends.triton_problem.__wrapped__)
    with pytest.raises(ValueError, match="triton"):
        create_model("qkformer_3_64", lif_backend="triton")
    network, x = network_of("once")
    for module in network.modules():
        if isinstance(module, neuron.LIF):
            module.function = backends.BACKENDS["triton"]
    with pytest.raises(ValueError, match="cpu"):
        network(x)


def test_a_single_value_has_no_variance():
    unit = lively(SpikingConv(3, 4)).train()
    with pytest.raises(ValueError, match=re.escape("(1, 1, 1, 1, 4)")):
        autograd.norm_lif_of(random(1, 1, 1, 1, 4), Unit((Norm(unit.bn, None),), 1))


def test_the_self_test_passes_single_blocks():
    assert selftest._in_half(DEVICE) is None


@pytest.mark.slow
def test_the_check_before_auto_takes_the_kernels(monkeypatch):
    with torch.inference_mode():
        assert selftest.problem(DEVICE) is None
    dead = self_attention.forward
    monkeypatch.setattr(self_attention, "forward", lambda s, *more: (dead(s, *more)[0] * 0, dead(s, *more)[1]))
    assert "self attention" in selftest._in_half(DEVICE)
    residual = selftest.plan._residual
    monkeypatch.setattr(selftest.plan, "_residual", lambda *arguments: residual(*arguments) * 0.5)
    assert "logits" in selftest.problem(DEVICE)


KERNELS = ("bn_lif", "bn_stats", "pool", "self_attention", "token_attention")
COMPILED = """
import json, sys, torch
from benchmarks.static import KERNELS, compiled, figures, recipe, steps_of
model, architecture, dtype, *kernels = sys.argv[1:]
steps = steps_of(recipe(model), getattr(torch, dtype)).values()
print(json.dumps(sum((figures(compiled(step, int(architecture), kernels or KERNELS)) for step in steps), [])))
"""
SLOW = [
    "qkformer_3_64 80 float16",
    "qkformer_3_64 90 float64",  # which "auto" tries first
    "qkformer_4_384 80 bfloat16",
    "qkformer_10_384 90 float16",
    "qkformer_10_768 90 float16",
    "qkformer_4_384 90 float16",
    "qkformer_2_256 90 float16",
]


@pytest.mark.parametrize(
    "arguments", ["qkformer_3_64 90 float16 bn_lif pool", *(pytest.param(a, marks=pytest.mark.slow) for a in SLOW)]
)
def test_every_launch_compiles(arguments):
    """Expect no spills and few instructions of the backward pass in float16 for sm_90."""
    command = [sys.executable, "-c", COMPILED, *arguments.split()]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    _, architecture, dtype, *kernels = arguments.split()
    files = {row["kernel"].split()[0] for row in rows}
    assert files | {"linear_lif"} == {"linear_lif", *(kernels or KERNELS)}  # it is for half precision
    if architecture == "90" and dtype == "float16":
        assert not [row["kernel"] for row in rows if row["spill"]]
        backward = [row["instructions"] for row in rows if row["kernel"].startswith("bn_lif backward")]
        assert 0 < max(backward) < 30  # an element
    long = [row["accesses"] for row in rows if row["kernel"].endswith("long")]  # the membrane of all samples
    assert all(re.fullmatch(r"(S\d+ )?L\d+( S\d+)?", accesses) for accesses in long)  # loads, then stores
