"""Networks, and test.py on released checkpoints, against the released code; golden_cases.py has the data."""

import argparse

import pytest
import torch
from golden_cases import MEMBRANES, MODELS, RIVALS, assert_close, load_case, make_weights
from scripts import execute, result_in

import engine.run
from engine.data.loaders import Data
from engine.run import build_model
from models import attention, layers, neuron

CASES = {name: load_case(name) for name in MODELS}
MEASURED = [
    (name, membrane, what)
    for name, case in CASES.items()
    for membrane in case.membranes
    for what in ("eval", "train")
    if f"{membrane}.{what}.logits" in case.arrays
]


def test_every_case_is_measured():
    assert len(CASES) == len(SCRIPTS) == 8
    assert len(MEASURED) == 7 * 2 + 1 + 5 * 2 + 1  # two membranes, ms has one; two cases hold no training step


LONG = [  # the small cases cover their code
    *((f"QKFormer_10_{width}_T1_B2_224_s0", membrane, "eval") for width in (512, 768) for membrane in MEMBRANES),
    ("QKFormer_10_384_T4_B2_224_s0", "corrected", "eval"),
    ("cifar10_T4_B3_32_s0", "corrected", "train"),
    ("cifar10-dvs_T8_B2_128_s0", "corrected", "train"),
    ("QKFormer_10_384_T4_B2_224_s0", "corrected", "train"),
    ("QKFormer_10_384_T4_B2_224_s0", "released", "train"),
]


@pytest.mark.parametrize(
    ("name", "membrane", "what"),
    [pytest.param(*case, marks=pytest.mark.slow) if case in LONG else case for case in MEASURED],
)
def test_equals_released_code(name, membrane, what):
    CASES[name].compare(CASES[name].model(membrane), membrane, what)


SMALL_RIVALS = [name for name in RIVALS if "cifar10_" in name]


@pytest.mark.parametrize("what", ["eval", "train"])
@pytest.mark.parametrize(
    "name", [name if name in SMALL_RIVALS else pytest.param(name, marks=pytest.mark.slow) for name in RIVALS]
)
def test_rival_equals_released_code(name, what):
    case = load_case(name)
    if f"ref.{what}.logits" in case.arrays:
        case.compare(case.model("ref"), "ref", what)


def _pool_before_bn(self, x):
    return self.bn(self.pool(self.conv(x.flatten(0, 1)))).unflatten(0, x.shape[:2])


def _pool_after_lif(self, x):
    spikes = self.lif(self.bn(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]))
    return self.pool(spikes.flatten(0, 1)).unflatten(0, x.shape[:2])


def _leak_batch_major(self, x):
    lif = neuron.torch_lif
    if not self.leak_across_batch:
        return lif(x, self.threshold)
    return lif(x.transpose(0, 1).flatten(0, 1), self.threshold).unflatten(0, x.shape[1::-1]).transpose(0, 1)


MUTATIONS = {
    "surrogate slope": (neuron, "ALPHA", 3.9),
    "threshold": (neuron.LIF.__init__, "__defaults__", (0.9, False, neuron.TAU)),
    "attention threshold": (attention, "ATTN_THRESHOLD", 1.0),
    "pooling before BatchNorm": (layers.ConvBN, "forward", _pool_before_bn),
    "pooling after the neurons": (layers.SpikingConv, "forward", _pool_after_lif),
    "membrane order": (neuron.LIF, "forward", _leak_batch_major),
}
ONLY_TRAINING = ("surrogate slope", "pooling before BatchNorm")


OVERRIDES = {
    "tau": {"tau": 1.9},
    "attention scale": {"ssa_scale": 0.2},
    "heads": {"heads": 4},
    "membrane": {"ssa_membrane": "per_sample"},
}


@pytest.mark.parametrize("mutation", [*MUTATIONS, *OVERRIDES])
def test_the_comparison_notices(mutation, monkeypatch):
    case = CASES["cifar100_T2_B2_32_s1"]
    if mutation in MUTATIONS:
        monkeypatch.setattr(*MUTATIONS[mutation])
    model = case.model("released", **OVERRIDES.get(mutation, {}))
    with pytest.raises(AssertionError):
        case.compare(model, "released", "train" if mutation in ONLY_TRAINING else "eval")


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
QUICK = ["cifar10_T4_B3_32_s0", "cifar10-dvs_T8_B2_128_s0"]  # test_released_files.py has ImageNet's format


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def released_content(name, case):
    """Return the weights in the file format of their training."""
    weights, steps = make_weights(case.about["state_dict"], case.seed), case.about["T"]
    if name.startswith("ms"):
        return {"state_dict": weights}
    if "dvs" in name:
        best = {"max_test_acc1": 84.0, "test_acc5_at_max_test_acc1": 97.0}
        args = argparse.Namespace(T=steps)
        return {"model": weights, "optimizer": {}, "lr_scheduler": {}, "epoch": 105, "args": args, **best}
    args = argparse.Namespace(time_step=steps, lr=1.0)
    if name.startswith("cifar"):
        return {"arch": "QKFormer", "state_dict": weights, "epoch": 409, "args": args, "version": 2, "metric": 96.2}
    return {"model": weights, "optimizer": {}, "epoch": 199, "scaler": {}, "args": args}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS]
)
def test_a_released_checkpoint_gives_the_golden_logits(name, float64, tmp_path, monkeypatch):
    case, logits = CASES[name], []
    torch.save(released_content(name, case), tmp_path / "released.pth")
    batch = case.input(), torch.arange(case.about["B"])
    data = Data(None, [batch], ["x"] * 1000, None, lambda image: image)

    def build(cfg):
        model = build_model(cfg)
        model.register_forward_hook(lambda model, images, output: logits.append(output))
        return model

    monkeypatch.setattr(engine.run, "build_model", build)
    monkeypatch.setattr(engine.run, "create_data", lambda cfg, here, train: data)
    monkeypatch.setattr("engine.weights.warn_of_silence", lambda cfg, model, images: None)
    monkeypatch.setattr("engine.data.pictures.gallery", lambda samples, path, title: None)
    for membrane in case.membranes:
        flags = ["--device", "cpu", "--checkpoint", str(tmp_path / "released.pth")]
        flags += ["--ssa-membrane", "per_sample"] if membrane == "corrected" else []  # "released" is the default
        flags += ["--time-steps", "2"] if membrane == "ms" else []  # this format does not record it
        execute(f"{SCRIPTS[name]}/test.py", *flags)
        expected, result = case.arrays[f"{membrane}.eval.logits"], result_in(tmp_path)
        assert_close(logits.pop().numpy(), expected, f"{name} {membrane}")
        assert (result["count"], result["time_steps"]) == (case.about["B"], case.about["T"])
        loss = torch.nn.functional.cross_entropy(torch.from_numpy(expected), batch[1])
        assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
