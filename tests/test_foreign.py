"""Checkpoints of timm's scripts, of Lightning and of safetensors: evaluated and fine-tuned as our own."""

import argparse
import math

import pytest
import torch
from safetensors.torch import save_file
from scripts import ROOT, here, refuses, result_in
from test_analysis import untrained
from timm.models import adapt_input_conv

from engine import checkpoint, config
from engine.weights import build_model, load_weights
from models.released import to_released

FIRST = "stages.0.embed.units.0.conv.weight"


def prefixed(prefix, weights):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def timm_file(weights, path):
    args = argparse.Namespace(model="qkformer_3_64", aa=None)
    torch.save({"epoch": 3, "arch": args.model, "state_dict": prefixed("module.", weights), "args": args}, path)


def averaged_timm_file(weights, path):
    untrained_weights = {name: torch.zeros_like(value) for name, value in weights.items()}
    torch.save({"arch": "qkformer_3_64", "state_dict": untrained_weights, "state_dict_ema": weights}, path)


def lightning_file(weights, path):
    content = {"epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.5.0", "callbacks": {}, "loops": {}}
    torch.save(content | {"state_dict": prefixed("model._orig_mod.", weights), "hyper_parameters": {"lr": 1}}, path)


WRITERS = {
    "timm.pth.tar": timm_file,
    "ema.pth.tar": averaged_timm_file,
    "lightning.ckpt": lightning_file,
    "weights.safetensors": save_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_another_trainer_is_evaluated_and_fine_tuned(name, tmp_path, monkeypatch, capfd):
    ours, quick = untrained(tmp_path / "best.pt", "digits/digits.yml"), ["--time-steps", 1]
    weights = checkpoint.read(ours)["state_dict"]
    path = tmp_path / "theirs" / name
    path.parent.mkdir()
    WRITERS[name](weights, path)
    here(monkeypatch, capfd, "digits/test.py", "--checkpoint", ours, *quick)
    here(monkeypatch, capfd, "digits/test.py", "--checkpoint", path, *quick)
    expected, found = result_in(tmp_path), result_in(path.parent)
    assert found["top1"] == expected["top1"]
    assert math.isclose(found["loss"], expected["loss"], rel_tol=1e-6)
    cfg = config.load(ROOT / "digits/digits.yml", ["--finetune", str(path)])
    model = build_model(cfg)
    load_weights(cfg, model, checkpoint.read(cfg.finetune), cfg.finetune, adapt=True)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def model_of(channels, **changes):
    flags = ["--in-channels", str(channels), *changes.get("flags", [])]
    cfg = config.load(ROOT / "cifar10/cifar10.yml", flags)
    return cfg, build_model(cfg)


@pytest.mark.parametrize("names", [lambda model: model.state_dict(), to_released])
@pytest.mark.parametrize(("before", "after"), [(3, 1), (3, 2), (3, 5), (2, 1)])
def test_fine_tuning_adapts_the_first_convolution_as_timm_does(before, after, names):
    source, (cfg, model) = model_of(before)[1], model_of(after, flags=["--num-classes", "7"])
    state = {"state_dict": {key: value.clone() for key, value in names(source).items()}}
    load_weights(cfg, model, state, "theirs.pt", adapt=True)
    expected = adapt_input_conv(after, source.state_dict()[FIRST])
    assert torch.equal(model.state_dict()[FIRST], expected)
    assert torch.equal(model.stages[0].blocks[0].attn.q.conv.weight, source.stages[0].blocks[0].attn.q.conv.weight)
    with refuses("theirs.pt"):
        load_weights(cfg, model, state, "theirs.pt")  # an evaluation takes no other network


def test_grey_weights_answer_alike_on_grey_images_in_three_channels():
    """timm adapts no other number of channels to 3."""
    source, (cfg, model) = model_of(1)[1], model_of(3)
    load_weights(cfg, model, {"state_dict": source.state_dict()}, "theirs.pt", adapt=True)
    images = torch.rand(2, 1, 32, 32)
    first = "stages.0.embed.units.0.conv"
    found = model.get_submodule(first)(images.expand(-1, 3, -1, -1))
    assert torch.allclose(found, source.get_submodule(first)(images), atol=1e-6)
