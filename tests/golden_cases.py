"""Golden cases: outputs of the released code in float64 on weights and inputs made from a seed.

Names end in `_s<seed>`. See `make_weights` and `make_input` for how both are drawn.
"""

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from models import LIF, create_model
from models.released import load_released, released_key_map

FOLDER = Path(__file__).parent / "golden"
MODELS = {  # case -> (variant, its arguments)
    "QKFormer_10_384_T4_B2_224_s0": ("qkformer_10_384", {}),
    "QKFormer_10_512_T1_B2_224_s0": ("qkformer_10_512", {}),
    "QKFormer_10_768_T1_B2_224_s0": ("qkformer_10_768", {}),
    "cifar10_T4_B3_32_s0": ("qkformer_4_384", {}),
    "cifar100_T2_B2_32_s1": ("qkformer_4_384", {"num_classes": 100}),
    "cifar10-dvs_T8_B2_128_s0": ("qkformer_2_256", {}),
    "dvs128-gesture_T6_B2_128_s0": ("qkformer_2_256", {"num_classes": 11, "mlp_ratio": 4}),
    "ms_qkformer_10_384_T2_B2_224_s0": ("qkformer_10_384", {"residual": "ms"}),
}
RIVALS = {
    "spikformer_8_384_T2_B2_224_s0": ("spikformer_8_384", {}),
    "spikformer_8_512_T1_B2_224_s0": ("spikformer_8_512", {}),
    "spikformer_cifar10_4_384_T2_B2_32_s0": ("spikformer_4_384", {}),
    "spikformer_cifar10-dvs_2_256_T4_B2_128_s0": ("spikformer_2_256", {}),
    "spikingformer_8_384_T2_B2_224_s0": ("spikingformer_8_384", {}),
    "spikingformer_cifar10_4_384_T2_B2_32_s0": ("spikingformer_4_384", {}),
    "spikingformer_cifar100_4_384_T4_B2_32_s1": ("spikingformer_4_384", {"num_classes": 100, "heads": 8}),
    "spikingformer_cifar10-dvs_2_256_T4_B2_128_s0": ("spikingformer_2_256", {}),
    "sdt_8_384_T2_B2_224_s0": ("sdt_8_384", {}),
    "sdt_cifar10_2_512_T2_B2_32_s0": ("sdt_2_512", {}),
    "sdt_dvs128-gesture_2_256_T4_B2_128_s0": ("sdt_2_256", {}),
}
MEMBRANES = {"released": "released", "corrected": "per_sample", "ms": "per_sample"}  # key in the data -> `ssa_membrane`
BIAS_RANGES = [["q_bn.bias", -2.5, -1.5]]  # of BatchNorms; others 0 to 1


@dataclass
class Golden:
    name: str
    about: dict
    arrays: dict[str, np.ndarray]

    @property
    def seed(self) -> int:
        return int(self.name.rsplit("_s", 1)[1])

    @property
    def membranes(self) -> list[str]:
        return sorted({key.split(".")[0] for key in self.arrays})

    def model(self, membrane: str, **overrides) -> nn.Module:
        """Build this project's network with the case's weights, float64."""
        name, kwargs = (MODELS | RIVALS)[self.name]
        if membrane in MEMBRANES:
            kwargs = {"ssa_membrane": MEMBRANES[membrane], **kwargs}
        model = create_model(name, **{"time_steps": self.about["T"], **kwargs, **overrides}).double()
        ranges = self.about.get("bn_bias_ranges", BIAS_RANGES)
        load_released(model, make_weights(self.about["state_dict"], self.seed, ranges))
        return model

    def input(self) -> torch.Tensor:
        return make_input(self.about["input_shape"], self.seed)

    def compare(self, model: nn.Module, membrane: str, what: str) -> None:
        """Assert that `what` ("eval" or "train") of the model equals the recorded figures."""
        measured = (measure_eval if what == "eval" else measure_train)(model, self)
        assert measured, "nothing was measured"
        for key, actual in measured.items():
            assert_close(actual, self.arrays[f"{membrane}.{what}.{key}"], f"{membrane}.{what}.{key}")


def load_case(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return Golden(name, json.loads((FOLDER / f"{name}.json").read_text()), dict(arrays))


def make_weights(shapes: dict[str, list[int]], seed: int, bias_ranges: list = BIAS_RANGES) -> dict[str, torch.Tensor]:
    """Draw float64 weights under released names, each from its own generator."""
    weights = {}
    for key, shape in shapes.items():
        g = np.random.Generator(np.random.PCG64(zlib.crc32(f"{seed}:{key}".encode())))
        module, leaf = f".{key}".split(".")[-2:]
        if leaf == "num_batches_tracked":
            weights[key] = torch.tensor(0)
            continue
        if leaf == "running_mean":
            value = 0.1 * g.standard_normal(shape)
        elif leaf == "running_var":
            value = g.uniform(0.5, 1.5, shape)
        elif "bn" in module and leaf == "weight":
            value = g.uniform(1.5, 2.5, shape)
        elif "bn" in module:
            low, high = next((limits for suffix, *limits in bias_ranges if key.endswith(suffix)), (0, 1))
            value = g.uniform(low, high, shape)
        elif leaf == "bias":
            value = 0.1 * g.standard_normal(shape)
        else:
            value = g.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
        weights[key] = torch.from_numpy(value)
    return weights


def make_input(shape: list[int], seed: int) -> torch.Tensor:
    g = np.random.Generator(np.random.PCG64(1000 + seed))
    values = g.standard_normal(shape) if len(shape) == 4 else g.poisson(0.3, shape).astype(np.float64)
    return torch.from_numpy(values)


def measure_eval(model: nn.Module, case: Golden) -> dict[str, np.ndarray]:
    rates, names = [], case.about["lif_names"]
    for module in model.modules():
        if isinstance(module, LIF):
            module.register_forward_hook(lambda module, args, spikes: rates.append(spikes.mean().item()))
    with torch.no_grad():
        logits = model.eval()(case.input())
    if any("shortcut_lif" in name for name in names):  # its name is the last of its block, but its call the first
        order = sorted(range(len(names)), key=lambda i: i - 4.5 if "shortcut_lif" in names[i] else i)
        rates = [rates[order.index(i)] for i in range(len(names))]
    return {"logits": logits.numpy(), "firing_rates": np.array(rates)}


def measure_train(model: nn.Module, case: Golden) -> dict[str, np.ndarray]:
    logits = model.train()(case.input())
    loss = F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])
    loss.backward()
    names = released_key_map(model)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    unread = torch.zeros(1)  # of parameters that the released code never reads
    gradients = [parameters[names[key]].grad if key in names else unread for key in case.about["param_names"]]
    return {
        "logits": logits.detach().numpy(),
        "loss": np.array(loss.item()),
        "grad_l2": np.array([g.norm().item() for g in gradients]),
        "grad_sum": np.array([g.sum().item() for g in gradients]),
        "buffers_l2": np.array([buffers[names[key]].double().norm().item() for key in case.about["buffer_names"]]),
    }


def assert_close(actual: np.ndarray, expected: np.ndarray, what: str, tolerance: float = 1e-9) -> None:
    """Assert a small relative error; entries below a thousandth of the largest count relative to that.

    Some are zero up to rounding, such as the gradient of a bias that a BatchNorm removes.
    """
    assert actual.shape == expected.shape, f"{what}: {actual.shape} instead of {expected.shape}"
    scale = np.maximum(np.abs(expected), 1e-3 * np.abs(expected).max())
    error = (np.abs(actual - expected) / scale).max()
    assert error <= tolerance, f"{what}: relative error {error:.2e}"
