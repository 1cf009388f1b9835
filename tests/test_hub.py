"""Networks saved for Hugging Face and loaded again."""

import json

import pytest
import timm
import torch
from huggingface_hub import PyTorchModelHubMixin
from scripts import same
from test_models import images, lively
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

from models import HierarchicalSpikingTransformer, create_model

ARGUMENTS = {"time_steps": 3, "attention": ("channel", "token", "self"), "num_classes": 5}


def inputs():
    return images(3, 1, 8, 12).float()


def assert_alike(actual, expected):
    """Assert equal weights and logits, of a network that spikes."""
    assert same(actual.state_dict(), expected.state_dict())
    with torch.no_grad():
        logits = expected(inputs())
        assert torch.equal(actual.eval()(inputs()), logits)
    assert logits.std(0).max() > 0.01


@pytest.mark.parametrize(("head", "safe"), [(None, False), (11, True)])
def test_timm_restores_what_it_saved(tmp_path, head, safe):
    model = lively(timm.create_model("qkformer_3_64", **ARGUMENTS)).float()
    if head:
        model.reset_classifier(head)
    save_for_hf(model, tmp_path, safe_serialization=safe)
    for create in (timm.create_model, create_model):
        restored = create(f"local-dir:{tmp_path}", pretrained=True)
        assert (restored.attention, restored.time_steps) == (ARGUMENTS["attention"], ARGUMENTS["time_steps"])
        assert resolve_model_data_config(restored)["input_size"] == (1, 8, 8)
        assert_alike(restored, model)


def test_a_saved_network_gets_another_head_or_gives_features(tmp_path):
    model = lively(timm.create_model("qkformer_3_64", **ARGUMENTS)).float()
    save_for_hf(model, tmp_path)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert other.head.out_features == 7
    other.head = model.head
    assert_alike(other, model)
    backbone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True)
    with torch.no_grad():
        maps = zip(
            backbone.eval()(inputs()), model.forward_intermediates(inputs(), intermediates_only=True), strict=True
        )
        assert all(torch.equal(a, b) and a.any() for a, b in maps)


def test_a_network_saved_on_a_gpu_loads_on_a_cpu_with_other_channels(tmp_path):
    """Save neither the backend nor the aliases of timm's arguments."""
    model = timm.create_model("qkformer_3_64", lif_backend="torch", in_channels=3, drop_path=0.2)
    save_for_hf(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert (saved["in_chans"], saved.keys() & {"lif_backend", "in_channels", "drop_path"}) == (3, set())
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).fast_path is not None
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1).in_chans == 1


class Mixed(HierarchicalSpikingTransformer, PyTorchModelHubMixin):
    """Network with `save_pretrained` and `from_pretrained`."""


def test_the_mixin_of_hugging_face_restores_arguments_and_weights(tmp_path):
    sizes = {"family": "cifar", "width": 64, "depths": (1, 1, 1), "heads": 8, "in_chans": 1}
    model = lively(Mixed(**sizes, **ARGUMENTS)).float()
    model.save_pretrained(tmp_path)
    restored = Mixed.from_pretrained(tmp_path)
    assert restored.time_steps == ARGUMENTS["time_steps"]
    assert_alike(restored, model)
