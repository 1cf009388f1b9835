"""Shapes, parameter counts, independence of the batch, and attention against independent formulas."""

import pytest
import timm
import torch
from scripts import refuses
from torch import nn

from models import create_model
from models.attention import ChannelQKAttention, SpikingSelfAttention, TokenQKAttention
from models.embed import SPEDS
from models.layers import DropPath
from models.neuron import torch_lif
from models.registry import VARIANTS


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return the model in float64, with statistics that make neurons fire."""
    g = torch.Generator().manual_seed(seed)
    module.double().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.weight.data.uniform_(1.5, 2.5, generator=g)
            part.bias.data.uniform_(0, 1, generator=g)
        elif isinstance(part, nn.Conv1d | nn.Conv2d):
            part.weight.data.normal_(std=(2 / part.weight[0].numel()) ** 0.5, generator=g)
    return module


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shortcut_false_leaves_out_only_the_shortcut():
    with_shortcut, without = (create_model("qkformer_4_384", shortcut=s).state_dict() for s in (True, False))
    assert with_shortcut.keys() - without.keys() == {key for key in with_shortcut if ".embed.shortcut." in key}


def test_spikformer_with_speds_adds_only_its_shortcut():
    plain, speds = (
        sum(p.numel() for p in create_model("spikformer_4_384", **more).parameters())
        for more in ({}, {"embed": "speds"})
    )
    assert speds == plain + 192 * 384 + 2 * 384  # 1x1 convolution, BatchNorm


@pytest.mark.parametrize(("ssa_membrane", "independent"), [("per_sample", True), ("released", False)])
def test_a_sample_in_any_company(ssa_membrane, independent):
    model = lively(create_model("qkformer_4_384", width=96, ssa_membrane=ssa_membrane))
    x = images(5, 3, 16, 16)
    with torch.no_grad():
        together, turned = model(x), model(x.flip(0)).flip(0)
        alone = torch.cat([model(sample[None]) for sample in x])
    assert torch.allclose(together, turned, atol=1e-12) == independent
    assert torch.allclose(together, alone, atol=1e-12) == independent
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["token", "channel", "self"])
@pytest.mark.parametrize("residual", ["sew", "ms"])
@pytest.mark.parametrize("name", ["qkformer_10_384", "qkformer_4_384", "qkformer_2_256"])
def test_every_family_keeps_no_state_and_takes_odd_shapes(name, residual, attention):
    attention = (attention,) * len(VARIANTS[name]["depths"])
    model = create_model(name, num_classes=3, residual=residual, attention=attention, time_steps=3)
    size = {"imagenet": (40, 56), "cifar": (9, 14), "dvs": (24, 40)}[model.family]
    keeps_no_state(lively(model), size)


@pytest.mark.parametrize("name", ["spikformer_4_384", "spikingformer_2_256", "sdt_2_512"])
def test_rivals_keep_no_state_and_take_odd_shapes(name):
    model = lively(create_model(name, num_classes=3, time_steps=3, depth=1))
    keeps_no_state(model, (9, 14))
    x = images(1, model.in_channels, 9, 14)
    state, frames = None, x[:, None].expand(-1, 3, -1, -1, -1)
    for frame in frames.unbind(1):
        logits, state = model.step(frame, state)
    torch.testing.assert_close(logits, model(x), rtol=1e-9, atol=1e-12)


def keeps_no_state(model, size):
    x = images(2, model.in_channels, *size)
    with torch.no_grad():
        first = model(x)
        assert first.shape == (2, 3)
        assert torch.equal(first, model(x))
        assert torch.equal(first, model(x[:, None].expand(-1, 3, -1, -1, -1)))  # the same as three equal frames
        assert model(x[:1, None]).shape == (1, 3)


def unit(conv_bn, x):
    """Compute 1x1 convolution and BatchNorm (eval mode) as an einsum: [T,B,C,N] -> [T,B,C',N]."""
    conv, bn = conv_bn.conv, conv_bn.bn
    y = torch.einsum("oc,tbcn->tbon", conv.weight[..., 0], x)
    if conv.bias is not None:
        y = y + conv.bias[:, None]
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return (y - bn.running_mean[:, None]) * scale[:, None] + bn.bias[:, None]


@pytest.mark.parametrize("kind", [TokenQKAttention, ChannelQKAttention, SpikingSelfAttention])
def test_attention_equals_einsum(kind):
    attention = lively(kind(12, heads=3), seed=1)
    if kind is SpikingSelfAttention:
        attention.k.bn.bias.data.add_(1)  # enough coincidences of the spikes to pass the threshold
    x = (images(4, 2, 12, 5, 9) > 0.3).double()  # non-square: the order of H and W counts
    tokens = x.reshape(4, 2, 12, 45)

    def spikes(name):
        return torch_lif(unit(attention.get_submodule(name), tokens), 1.0).reshape(4, 2, 3, 4, 45)

    q, k = spikes("q"), spikes("k")
    if kind is TokenQKAttention:
        y = torch.einsum("tbhn,tbhdn->tbhdn", torch_lif(torch.einsum("tbhdn->tbhn", q), 0.5), k)
    elif kind is ChannelQKAttention:
        y = torch.einsum("tbhd,tbhdn->tbhdn", torch_lif(torch.einsum("tbhdn->tbhd", q), 0.5), k)
    else:
        y = torch_lif(torch.einsum("tbhdn,tbhdm,tbhem->tbhen", q, k, spikes("v")) * 0.125, 0.5)
    assert 0.02 < y.mean() < 0.98
    expected = torch_lif(unit(attention.proj, y.reshape(4, 2, 12, 45)), 1.0).reshape(x.shape)
    assert 0.02 < expected.mean() < 0.98
    with torch.no_grad():
        assert torch.equal(attention(x), expected)


def test_speds_rounds_sizes_up_on_both_paths():
    embed = lively(SPEDS(2, [(4, False), (4, True), (8, True), (8, True)], branch=2))
    assert embed(images(1, 2, 2, 33, 50)).shape == (1, 2, 8, 5, 7)


@pytest.mark.parametrize(
    ("name", "kwargs", "value"),
    [
        ("qkformer_10_385", {}, "qkformer_10_385"),
        ("qkformer_4_384", {"time_steps": 0}, "time_steps"),
        ("qkformer_4_384", {"global_pool": "max"}, "max"),
        ("qkformer_4_384", {"in_chans": 1, "in_channels": 3}, "in_channels"),
        ("qkformer_4_384", {"mlp_ratio": 0}, "mlp_ratio"),
        ("qkformer_4_384", {"heads": 7}, "heads"),
        ("qkformer_4_384", {"attention": ("token", "self")}, "attention"),
        ("qkformer_4_384", {"attention": "token"}, "attention"),
        ("qkformer_4_384", {"attention": ("token", "self", "linear")}, "linear"),
        ("qkformer_4_384", {"residual": "add"}, "add"),
        ("qkformer_4_384", {"ssa_membrane": "leaky"}, "leaky"),
        ("qkformer_4_384", {"ssa_membrane": "released", "residual": "ms"}, "ssa_membrane"),
        ("qkformer_4_384", {"lif_backend": "jax"}, "jax"),
        ("qkformer_4_384", {"neuron": "izhikevich"}, "izhikevich"),
        ("spikformer_4_384", {"embed": "rpe"}, "rpe"),
        ("sdt_2_512", {"embed": "speds"}, "speds"),
        ("spikformer_4_384", {"pools": "11"}, "pools"),
    ],
)
def test_bad_arguments_are_refused(name, kwargs, value):
    with refuses(value):
        create_model(name, **kwargs)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 4, 1, 32, 32)])
def test_bad_input_is_reported(shape):
    with refuses("[B,3,H,W]"):
        create_model("qkformer_4_384")(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_input_of_integers_is_reported(dtype):
    with torch.no_grad(), pytest.raises(TypeError, match=rf"^[^\n]*{dtype}.*x\.float\(\)[^\n]*$"):
        create_model("qkformer_3_64")(torch.ones(2, 1, 8, 8).to(dtype))


@pytest.mark.parametrize("lif_backend", ["torch", "auto"])
def test_frames_may_come_time_first(lif_backend):
    model = lively(create_model("qkformer_2_64", lif_backend=lif_backend))
    x = images(2, 3, 2, 16, 16)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(model(x.transpose(0, 1), time_first=True), expected)
        assert not torch.equal(model(x.transpose(0, 1))[:2], expected)
        assert torch.equal(model(x[:, 0], time_first=True), model(x[:, 0]))  # images have no time axis


def test_drop_path_drops_whole_branches_of_samples_and_keeps_the_mean():
    branch = DropPath(0.25).train()
    x = torch.ones(4, 4000, 3, 1, 1)
    y = branch(x)
    assert torch.equal(y, y[:1, :, :1].expand_as(y))  # alike at every time step and in every channel
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(branch.eval()(x), x)


def test_drop_path_rises_from_block_to_block_and_works_in_training_only():
    model = lively(create_model("qkformer_4_384", drop_path=0.3, time_steps=1, num_classes=5))
    assert [block.drop_path.rate for stage in model.stages for block in stage.blocks] == pytest.approx(
        [0, 0.1, 0.2, 0.3]
    )
    assert timm.create_model("qkformer_4_384", drop_path_rate=0.3).stages[2].blocks[1].drop_path.rate > 0.29
    x = images(2, 3, 8, 8)
    plain = create_model("qkformer_4_384", time_steps=1, num_classes=5).double().eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        model.train(), plain.train()
        torch.manual_seed(0)
        assert not torch.equal(model(x), plain(x))
    with refuses("drop_path"):
        create_model("qkformer_3_64", drop_path=1)


def train(model, x):
    """Return loss, gradients and running statistics of one step, and the number of values that autograd kept."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = model(x).square().mean()
    loss.backward()
    return [loss, *(p.grad for p in model.parameters()), *model.buffers()], sum(kept)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointed_activations_change_nothing_but_memory(drop_path):
    steps = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = lively(create_model("qkformer_3_64", in_channels=3, drop_path=drop_path)).train()
        model.set_grad_checkpointing(enable)
        calls = []
        model.stages[2].blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        steps.append(train(model, images(4, 3, 8, 8)))
        assert len(calls) == 1 + enable
    (plain, memory), (checkpointed, less) = steps
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert less < memory / 5


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_whole_network_is_one_graph_to_the_compiler(checkpointing):
    steps = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        settings = {"depths": (1,), "attention": ("self",), "in_channels": 3, "time_steps": 2, "width": 16}
        model = lively(create_model("qkformer_3_64", drop_path=0.5, **settings)).train()
        if is_compiled:
            model.to(memory_format=torch.channels_last).set_grad_checkpointing(checkpointing)
            model.compile(backend="aot_eager", fullgraph=True)  # without minutes of C++ compilation
        steps.append(train(model, images(8, 3, 8, 8)))
    (plain, memory), (compiled, less) = steps
    for expected, actual in zip(plain, compiled, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert (less < memory / 5) == checkpointing
