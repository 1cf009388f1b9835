"""The networks equal the released code: see golden_cases.py for the data."""

import pytest
from golden_cases import MEMBRANES, MODELS, RIVALS, load_case

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
    assert len(CASES) == 8
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
    "threshold": (neuron.LIF.__init__, "__defaults__", (0.9, False)),
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
    """Each property of the networks, changed, breaks the comparison with the released code."""
    case = CASES["cifar100_T2_B2_32_s1"]
    if mutation in MUTATIONS:
        monkeypatch.setattr(*MUTATIONS[mutation])
    model = case.model("released", **OVERRIDES.get(mutation, {}))
    with pytest.raises(AssertionError):
        case.compare(model, "released", "train" if mutation in ONLY_TRAINING else "eval")
