"""Fused path against the modules after a change of anything that it reads: equal results, or the modules compute."""

import copy
from collections import OrderedDict
from types import FunctionType

import pytest
import torch
from test_models import images, lively
from torch import nn

from engine.weights import silent_layers
from models import create_model, set_lif_backend
from models.fused.kernels import launch
from models.layers import SpikingConv
from models.neuron import LIF

METHODS = ("forward", "attend", "_over_time", "_conv_forward", "_check_input_dim", "_call_impl")
SETTINGS = {
    "width": 32,
    "depths": (1, 1, 1),
    "heads": 2,
    "attention": ("token", "channel", "self"),
    "mlp_ratio": 1,
    "ssa_scale": 0.5,
}


def network(time_steps=2):
    """Return a network with every kind of module, whose neurons fire, and images."""
    model = lively(create_model("qkformer_4_384", time_steps=time_steps, num_classes=3, **SETTINGS))
    x = images(2, 3, 8, 8)
    set_lif_backend(model, "torch")
    assert not silent_layers(model, x)
    return model, x


def doubled(function):
    return lambda *x, **more: 2 * function(*x, **more)


class Doubled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *x):
        return 2 * self.module(*x)


def patched(name, instead_of=None):
    """Return a change that sets a doubled or failing method as an attribute, or as the attribute `instead_of`."""

    def patch(m):
        if instead_of:
            delattr(m, instead_of)
        method = getattr(m, name)
        setattr(m, name, doubled(method) if name != "_check_input_dim" else lambda x: 1 / 0)

    return patch


HOOKS = {  # dictionary of hooks -> function that registers a hook there, one that changes values if possible
    "_forward_hooks": lambda m: m.register_forward_hook(lambda m, x, y: 2 * y),
    "_forward_pre_hooks": lambda m: m.register_forward_pre_hook(lambda m, x: tuple(2 * part for part in x)),
    "_backward_hooks": lambda m: m.register_full_backward_hook(lambda m, x, y: None),
    "_backward_pre_hooks": lambda m: m.register_full_backward_pre_hook(lambda m, y: None),
}
DATA = {
    "halved": lambda x: x * 0.5,
    "shorter": lambda x: x[:-1],
    "strided": lambda x: torch.stack([x, x + 1], -1)[..., 0],
}


def other(value):
    """Return another value of the type, or None if there is none."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 0.5 * value + 0.1
        case str():
            return "circular" if value == "zeros" else value + "x"
        case FunctionType():
            return doubled(value)
        case (int(), *_):
            return type(value)(part + 1 for part in value)
    return None


def setter(name, value):
    return lambda m: setattr(m, name, value)


def replacer(name, change):
    """Return a change that gives the tensor `name` other data."""

    def replace(m):
        getattr(m, name).data = change(getattr(m, name).data)

    return replace


def doubler(name, copied=False):
    """Return a change that doubles the child `name`, in the module's dictionary or a copy."""

    def replace(m):
        m.__dict__["_modules"] = dict(m._modules) if copied else m._modules
        m._modules[name] = Doubled(m._modules[name])

    return replace


def changes_of(m):
    """Return {label: functions of a module} that change every attribute, child, tensor, hook and method of `m`."""
    changes = {}
    for name, value in vars(m).items():
        if (new := other(value)) is not None:
            changes[name] = [setter(name, new)]
        if isinstance(value, float):
            tensor = torch.tensor(value, dtype=torch.float64)
            changes[f"{name} tensor"] = [setter(name, tensor), replacer(name, DATA["halved"])]
    for name, register in HOOKS.items():
        changes[f"{name} hook"] = [register]
        changes[f"{name} new hook"] = [setter(name, OrderedDict()), register]
    for name in METHODS:
        if hasattr(m, name) and not (name == "forward" and isinstance(m, nn.ModuleList)):
            changes[f"{name} patched"] = [patched(name)]
            changes[f"{name} patched for another"] = [patched(name, instead_of="spare")]
    for name, child in m._modules.items():
        if child is not None:
            changes[f"{name} replaced"] = [doubler(name)]
            changes[f"{name} replaced in a copy"] = [doubler(name, copied=True)]
    for name, tensor in (m._parameters | m._buffers).items():
        if tensor is not None and tensor.dim():
            changes |= {f"{name} {label}": [replacer(name, change)] for label, change in DATA.items()}
            changes[f"{name} removed"] = [setter(name, None)]
    return changes


def places():
    """Return {kind: name of the last such module in the stages}; units with pooling or tokens are kinds, too."""
    model, _ = network()
    names = {}
    for name, m in model.stages.named_modules():
        pools = isinstance(m, SpikingConv) and isinstance(m.pool, nn.MaxPool2d)
        tokens = isinstance(m, SpikingConv) and isinstance(m.conv, nn.Conv1d)
        names[type(m).__name__ + " pools" * pools + " tokens" * tokens] = name
    return names


PLACES = places()


def changed(model, place, steps):
    """Return a copy of the network after the steps, with a coverage computed before each step."""
    model = copy.deepcopy(model)
    m = model.stages.get_submodule(place)
    m.spare = 1
    for step in steps:
        answer(model)
        step(m)
    return model


def outcome(model, x):
    """Return the logits, or the error that the network raises."""
    torch.manual_seed(0)
    try:
        return model(x).detach()
    except Exception as error:
        return error


def assert_equal(actual, expected, what):
    if isinstance(actual, Exception) or isinstance(expected, Exception):
        assert isinstance(actual, Exception), f"{what}: {expected}"
        assert isinstance(expected, Exception), f"{what}: {actual}"
    else:
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=1e-12, equal_nan=True, msg=lambda line: f"{what}: {line}"
        )


@pytest.mark.parametrize("kind", PLACES)
def test_evaluation_without_gradients_is_that_with_gradients(kind):
    model, x = network()
    set_lif_backend(model, "auto")
    before, effects = model(x).detach(), 0
    for label, steps in changes_of(model.stages.get_submodule(PLACES[kind])).items():
        trial = changed(model, PLACES[kind], steps)
        with torch.no_grad():
            actual = outcome(trial, x)
        expected = outcome(trial, x)
        assert_equal(actual, expected, label)
        effects += isinstance(expected, Exception) or not torch.allclose(before, expected, equal_nan=True)
    assert effects or kind == "ModuleList"  # which nothing calls


OTHERS = {  # changes of the block and the SPEDS of a stage
    "kind of pooling": lambda block, speds: setattr(speds.units[1], "pool", nn.AvgPool2d(3, 2, 1)),
    "projection": lambda block, speds: setattr(block.attn, "proj", nn.Identity()),
    "mean of all batches": lambda block, speds: setattr(block.mlp.fc1.bn, "momentum", None),
    "affine": lambda block, speds: setattr(block.mlp.fc1, "bn", nn.BatchNorm2d(16, affine=False).double().eval()),
    "frozen": lambda block, speds: block.attn.q.bn.train(),
    "groups": lambda block, speds: setattr(block.mlp.fc1, "conv", nn.Conv2d(16, 16, 1, groups=2).double()),
    "strides": lambda block, speds: setattr(block.attn.q.conv, "stride", 1),
    "parametrization": lambda block, speds: nn.utils.parametrizations.weight_norm(block.mlp.fc1.conv),
    "width": lambda block, speds: setattr(block.attn, "q", SpikingConv(16, 32, tokens=True).double().eval()),
    "learned threshold": lambda block, speds: setattr(block.mlp.fc1.lif, "threshold", nn.Parameter(torch.ones(()))),
    "thresholds": lambda block, speds: setattr(block.mlp.fc1.lif, "threshold", torch.full((16, 1, 1), 0.8)),
    "leak": lambda block, speds: setattr(block.attn.k.lif, "leak_across_batch", True),
    "leak of images": lambda block, speds: setattr(speds.units[0].lif, "leak_across_batch", True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_replaced_parts_count(name):
    model, x = network()
    set_lif_backend(model, "auto")
    assert answer(model) is not None
    OTHERS[name](model.stages[1].blocks[0], model.stages[0 if "images" in name else 1].embed)
    assert answer(model) is None
    assert answer(copy.deepcopy(model)) is None
    with torch.no_grad():
        actual = outcome(model, x)
    assert_equal(actual, outcome(model, x), name)


def answer(model):
    return model.fast_path.covered(model).function


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU the interpreter runs the kernels")
def test_the_kernels_follow_all_changes_that_leave_them_in_use(monkeypatch):
    for constant, value in (("PROGRAMS", 3), ("WARPS", 64)):  # the interpreter takes as long for a program of any size
        monkeypatch.setattr(launch, constant, value)
    model, x = network(time_steps=1)
    set_lif_backend(model, "triton")
    names = []
    for place in PLACES.values():
        for label, steps in changes_of(model.stages.get_submodule(place)).items():
            if label == "branch" or any(word in label for word in ("hook", "patched", "replaced", "tensor")):
                continue  # an error, or left to the modules
            if answer(changed(model, place, steps)) is not None:
                steps[0](model.stages.get_submodule(place))
                names.append(label)
    assert {"eps", "momentum", "scale", "rate", "weight halved", "running_var halved"} <= set(names)
    assert answer(model) is not None
    reference, results = copy.deepcopy(model), []
    set_lif_backend(reference, "torch")
    for trained in (reference, model):
        torch.manual_seed(0)
        logits = trained.train()(x)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in trained.parameters()), *trained.buffers()])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("learns", [False, True])
def test_stages_and_their_blocks_are_called(learns):
    model, x = network()
    set_lif_backend(model, "auto")
    called = []
    for stage in model.stages:
        stage.register_forward_hook(lambda *_: called.append("stage"))
        stage.blocks.register_forward_hook(lambda *_: called.append("blocks"))
    with torch.set_grad_enabled(learns):
        model(x)
    assert called == ["blocks", "stage"] * 3


def test_a_wrapped_stage_is_called():
    """Wrap a stage by hand; test_tools.py uses torch's wrappers."""
    model, x = network()
    set_lif_backend(model, "auto")
    expected = model(x)
    model.stages[1] = Doubled(model.stages[1])
    actual = model(x)
    assert not torch.equal(actual, expected)
    with torch.no_grad():
        assert torch.equal(model(x), actual)


def test_changed_classes_and_global_hooks_count(monkeypatch):
    model, x = network()
    set_lif_backend(model, "auto")
    assert answer(model) is not None
    with monkeypatch.context() as patched:
        patched.setattr(SpikingConv, "forward", nn.Identity.forward)
        assert answer(model) is None
    assert answer(model) is not None
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    with torch.no_grad():
        model(x)
    handle.remove()
    assert sum(isinstance(module, LIF) for module in called) == sum(isinstance(m, LIF) for m in model.modules())
    assert answer(model) is not None
