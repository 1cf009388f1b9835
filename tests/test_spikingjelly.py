"""What users of spikingjelly bring along: its functions and monitors on our networks."""

import pytest
import torch
from spikingjelly.activation_based import functional, monitor
from test_models import images, lively

from models import LIF, create_model


@pytest.fixture
def model():
    return lively(create_model("qkformer_2_64"))


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
def test_functions_are_harmless(model, prepare, caplog):
    x = images(2, 3, 2, 16, 16)
    with torch.no_grad():
        expected = model(x)
        prepare(model)
        assert torch.equal(model(x), expected)
    assert not caplog.records


def test_monitors_record_spikes_and_currents(model):
    """From the currents follow the membranes."""
    spikes, currents = monitor.OutputMonitor(model, LIF), monitor.InputMonitor(model, LIF)
    with torch.no_grad():
        model(images(2, 3, 2, 16, 16))
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
