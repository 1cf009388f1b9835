"""Tools of torch and spikingjelly: the network's logits and gradients, or an error."""

import copy
import io
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, monitor
from test_models import images, lively
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from models import LIF, create_model

OF_TORCHSCRIPT = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


@pytest.fixture
def model():
    """Return a network in float64 and evaluation mode that spikes."""
    return spiking()


def spiking(seed=0):
    model = lively(create_model("qkformer_3_64", time_steps=3), seed)
    with torch.no_grad():
        assert model(inputs()).std(0).max() > 0.01  # else the comparisons below would be of zeros
    return model


def inputs(batch=4, seed=0):
    return images(batch, 1, 8, 8, seed=seed)


def gradients(model, x):
    """Return logits, and gradients of all parameters for a loss that reads all logits."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits = model(x)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), parameters)


def assert_alike(actual, expected):
    """Assert equal logits, and gradients up to rounding, because tools sum in another order."""
    assert torch.equal(actual[0], expected[0])
    for a, b in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export(model, strict):
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (inputs(),), dynamic_shapes=(batch,), strict=strict)
    with torch.no_grad():
        assert torch.equal(program.module()(inputs(7, seed=1)), model(inputs(7, seed=1)))
    if not strict:
        assert_alike(gradients(program.module(), inputs()), gradients(model, inputs()))


@OF_TORCHSCRIPT
def test_trace(model):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, inputs()), file)
    file.seek(0)
    assert_alike(gradients(torch.jit.load(file), inputs(7, seed=1)), gradients(model, inputs(7, seed=1)))


def test_script_is_refused(model):
    with pytest.raises(TypeError, match=r"^[^\n]*torch\.export[^\n]*$"):
        torch.jit.script(model)


@OF_TORCHSCRIPT
def test_tensorboard_graph(model, tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_graph(model, inputs())
    (file,) = tmp_path.iterdir()
    assert b"SpikingSelfAttention" in file.read_bytes()


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_gradients_of_each_sample(model):
    def loss(weights, sample):
        return functional_call(model, weights, (sample[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters(model), inputs())
    for i, sample in enumerate(inputs()):
        _, expected = gradients(model, sample[None])
        for a, b in zip(each.values(), expected, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_ensembles(with_gradients):
    networks, x = [spiking(seed) for seed in range(2)], inputs()
    weights, buffers = stack_module_state(networks)
    with torch.set_grad_enabled(with_gradients):
        logits = vmap(lambda w, b: functional_call(networks[0], (w, b), (x,)))(weights, buffers)
        for network, y in zip(networks, logits, strict=True):
            torch.testing.assert_close(y, network(x), rtol=1e-12, atol=1e-12)
        assert torch.equal(functional_call(networks[0], networks[1].state_dict(), (x,)), networks[1](x))


def test_forward_and_reverse_derivatives_agree(model):
    direction, weight = inputs(seed=1), torch.randn(4, 10, dtype=torch.float64)
    logits, change = jvp(model, (inputs(),), (direction,))
    _, pull = vjp(model, inputs())
    assert torch.equal(logits, model(inputs()))
    assert change.norm() > 1e-3
    torch.testing.assert_close((change * weight).sum(), (pull(weight)[0] * direction).sum())


@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_of_each_stage(model, training):
    model.train(training)
    wrapped, calls = copy.deepcopy(model), []
    wrapped.stages[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for i, stage in enumerate(wrapped.stages):
        wrapped.stages[i] = checkpoint_wrapper(stage)
    assert_alike(gradients(wrapped, inputs()), gradients(model, inputs()))
    assert calls == [1, 1]  # again in the backward pass


@pytest.mark.parametrize("of_stages", [True, False])
def test_fsdp(model, of_stages):
    expected = gradients(model, inputs())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*model.stages, model) if of_stages else (model,):
            fully_shard(module, mesh=mesh)
        with torch.no_grad():
            assert torch.equal(model(inputs()), expected[0])
        logits = model(inputs())
        logits.square().sum().backward()
        assert_alike((logits.detach(), [p.grad.full_tensor() for p in model.parameters()]), expected)
    finally:
        torch.distributed.destroy_process_group()


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved, nn.DataParallel, AveragedModel],
    ids=["deepcopy", "pickle", "save", "DataParallel", "AveragedModel"],
)
def test_copies(model, copied):
    other = copied(model)
    assert_alike(gradients(other, inputs()), gradients(model, inputs()))
    with torch.no_grad():
        assert torch.equal(other(inputs()), model(inputs()))
    assert any(isinstance(module, LIF) for module in other.modules())


@pytest.mark.parametrize(
    "prepare",
    [
        functional.reset_net,
        functional.detach_net,
        lambda model: functional.set_step_mode(model, "s"),
        lambda model: functional.set_backend(model, "cupy"),
    ],
    ids=["reset_net", "detach_net", "set_step_mode", "set_backend"],
)
def test_functions_of_spikingjelly_are_harmless(model, prepare, caplog):
    x = inputs()
    with torch.no_grad():
        expected = model(x)
        prepare(model)
        assert torch.equal(model(x), expected)
    assert not caplog.records


def test_monitors_of_spikingjelly_record_spikes_and_currents(model):
    spikes, currents = monitor.OutputMonitor(model, LIF), monitor.InputMonitor(model, LIF)
    with torch.no_grad():
        model(inputs())
    neurons = [name for name, module in model.named_modules() if isinstance(module, LIF)]
    assert spikes.monitored_layers == neurons
    for name in neurons:
        (spike_seq,), (current_seq,), neuron = spikes[name], currents[name], model.get_submodule(name)
        v = 0.0
        for spike, current in zip(spike_seq, current_seq, strict=True):
            h = neuron.charge(current, v)  # the membrane before the reset
            v = h * (h < neuron.threshold)
            assert torch.equal(spike, (h >= neuron.threshold).to(h.dtype))
    assert sum(spike_seq.any() for (spike_seq,) in map(spikes.__getitem__, neurons)) > len(neurons) / 2
