"""A released checkpoint, evaluated by test.py as a user would, gives the released code's logits."""

import argparse
import runpy
import sys

import pytest
import torch
from golden_cases import assert_close, load_case, make_weights
from scripts import ROOT, result_in

import engine.run
from engine.data.loaders import Data
from engine.evaluate import Gallery

SCRIPTS = {
    "QKFormer_10_384_T4_B2_224_s0": "imagenet",
    "QKFormer_10_512_T1_B2_224_s0": "imagenet",
    "QKFormer_10_768_T1_B2_224_s0": "imagenet",
    "ms_qkformer_10_384_T2_B2_224_s0": "imagenet",
    "cifar10_T4_B3_32_s0": "cifar10",
    "cifar100_T2_B2_32_s1": "cifar100",
    "cifar10-dvs_T8_B2_128_s0": "cifar10-dvs",
    "dvs128-gesture_T6_B2_128_s0": "dvs128-gesture",
}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def released_content(name, case):
    """The weights in the file format of their training."""
    weights = make_weights(case.about["state_dict"], case.seed)
    args = argparse.Namespace(time_step=case.about["T"], lr=1.0)
    if name.startswith("QK"):
        return {"model": weights, "optimizer": {}, "epoch": 199, "scaler": {}, "args": args}
    if name.startswith("cifar") and "dvs" not in name:
        return {"arch": "QKFormer", "state_dict": weights, "epoch": 409, "args": args, "version": 2, "metric": 96.2}
    if "dvs" in name:
        args = argparse.Namespace(T=case.about["T"])
        best = {"max_test_acc1": 84.0, "test_acc5_at_max_test_acc1": 97.0}
        return {"model": weights, "optimizer": {}, "lr_scheduler": {}, "epoch": 105, "args": args, **best}
    return {"state_dict": weights}


# test_golden.py has the others' networks, and test_released_files.py the format of ImageNet's
QUICK = ["cifar10_T4_B3_32_s0", "cifar10-dvs_T8_B2_128_s0"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS]
)
def test_a_released_checkpoint_gives_the_golden_logits(name, float64, tmp_path, monkeypatch):
    case, logits = load_case(name), []
    torch.save(released_content(name, case), tmp_path / "released.pth")
    images = case.input()
    labels = torch.arange(len(images))
    monkeypatch.setattr(
        engine.run,
        "create_data",
        lambda cfg, here, train: Data(None, [(images, labels)], ["x"] * cfg.num_classes, None, None),
    )
    monkeypatch.setattr(Gallery, "add", lambda self, x, y, z: logits.append(z))
    monkeypatch.setattr(Gallery, "draw", lambda self, path: None)
    for membrane in case.membranes:
        flags = ["--device", "cpu", "--checkpoint", str(tmp_path / "released.pth")]
        flags += ["--ssa-membrane", "per_sample"] if membrane == "corrected" else []  # "released" is the default
        flags += ["--time-steps", "2"] if membrane == "ms" else []  # this format does not record it
        monkeypatch.setattr(sys, "argv", ["test.py", *flags])
        runpy.run_path(str(ROOT / SCRIPTS[name] / "test.py"), run_name="__main__")
        assert_close(logits.pop().numpy(), case.arrays[f"{membrane}.eval.logits"], f"{name} {membrane}")
        result = result_in(tmp_path)
        assert (result["count"], result["time_steps"]) == (len(images), case.about["T"])
        expected = torch.from_numpy(case.arrays[f"{membrane}.eval.logits"])
        assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(expected, labels).item(), rel=1e-5)
