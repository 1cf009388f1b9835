"""Energy: the formulas give every published row, and the counts agree with other counters."""

import csv
import json
import math

import numpy as np
import pytest
import timm
import torch
import yaml
from golden_cases import assert_close, load_case
from scripts import ROOT, here, ranks, refuses, result_in
from test_analysis import untrained
from test_models import lively
from torch.utils.flop_counter import FlopCounterMode

from analysis.energy import AC_PJ, MAC_PJ, energy_mj, estimate
from analysis.energy_report import MJ
from engine import config
from engine.run import build_model
from models import create_model

PUBLISHED = yaml.safe_load((ROOT / "analysis/published.yml").read_text())["tables"]["imagenet_others"]["rows"]
QKFORMER = [  # recipe, 10^9 MACs a step, of the first convolution, implied mean input
    ("qkformer_10_384", 5.899, 0.0650, 0.664),
    ("qkformer_10_512", 10.427, 0.0867, 0.548),
    ("qkformer_10_768", 23.329, 0.1301, 0.437),
    ("qkformer_10_768_t1", 23.329, 0.1301, 0.379),
    ("qkformer_10_768_288", 38.564, 0.2150, 0.437),
    ("qkformer_10_768_384", 68.557, 0.3822, 0.434),
]


def implied_mean_input(energy, macs, first_macs, time_steps):
    """Return the mean input of all layers but the first at which `energy_mj` is `energy` (mJ)."""
    return (energy / MJ - MAC_PJ * time_steps * first_macs) / (AC_PJ * time_steps * (macs - first_macs))


def counted(model, size):
    """Count the MACs of all time steps with torch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2


def estimated(model, size):
    return estimate(model, torch.empty(1, 3, size, size, device="meta"))


@pytest.mark.parametrize(("recipe", "macs", "first", "mean"), QKFORMER)
def test_rows_of_qkformer(recipe, macs, first, mean):
    cfg = config.load(ROOT / f"imagenet/{recipe}.yml")
    with torch.device("meta"):
        model = build_model(cfg)
    report = estimated(model, cfg.input_size)
    if recipe == "qkformer_10_384":
        head = report.layers[-1].macs  # executed once, counted in every step
        assert counted(model, cfg.input_size) == cfg.time_steps * (report.flops - head) + head
    with refuses():
        report.energy_mj  # noqa: B018
    first_macs = report.layers[0].macs
    assert (round(report.flops / 1e9, 3), round(first_macs / 1e9, 4)) == (macs, first)
    implied = implied_mean_input(cfg.paper_energy_mj, report.flops, first_macs, cfg.time_steps)
    # a figure of 3 decimals, from an energy of 2: within half a unit of both
    others = cfg.time_steps * (report.flops - first_macs)
    assert abs(implied - mean) <= 0.0005 + 0.005 / (AC_PJ * others * MJ)


def test_a_wrapped_network_has_its_time_steps():
    network = timm.create_model("qkformer_3_64", features_only=True)
    assert estimate(network, torch.zeros(1, 1, 8, 8)).time_steps == 4


@pytest.mark.parametrize(
    "row", [row for row in PUBLISHED if "not spiking" in row["network"]], ids=lambda row: row["timm"]
)
def test_rows_of_anns(row):
    with torch.device("meta"):
        model = timm.create_model(row["timm"])
    size = model.pretrained_cfg["input_size"][-1]
    report = estimated(model, size)
    assert report.flops == counted(model, size)
    assert report.time_steps == 1
    assert math.isclose(report.energy_mj, MAC_PJ * report.flops * MJ)
    assert round(MAC_PJ * math.floor(report.flops / 1e8) / 10, 2) == row["energy (mJ)"]


IMPLIED = {  # mean inputs of docs/analyses.md; two rows of sdt_8_512, T = 1 and T = 4
    "spikformer_8_384": 0.366,
    "spikformer_8_512": 0.335,
    "spikformer_8_768": 0.297,
    "spikingformer_8_384": 0.209,
    "spikingformer_8_512": 0.197,
    "spikingformer_8_768": 0.168,
    "sdt_8_384": 0.163,
    "sdt_8_512": 0.099,
    "sdt_8_768": 0.020,
}


@pytest.mark.parametrize(
    "row", [row for row in PUBLISHED if row.get("timm") in IMPLIED], ids=lambda row: row["network"]
)
def test_rows_of_rivals(row):
    with torch.device("meta"):
        report = estimated(timm.create_model(row["timm"], time_steps=1), row["input"])
    first_macs = report.layers[0].macs
    counted_first = 3 * 3 * 3 * row.get("first_channels", 0) * row["input"] ** 2 or first_macs
    others = report.flops - first_macs
    implied = implied_mean_input(row["energy (mJ)"], others + counted_first, counted_first, row["T"])
    assert abs(implied - IMPLIED[row["timm"]]) <= 0.001


@pytest.mark.parametrize("row", [row for row in PUBLISHED if "sops" in row], ids=lambda row: row["network"])
def test_rows_of_other_spiking_networks(row):
    first = 3 * 3 * 3 * row["first_channels"] * 224**2
    assert round(energy_mj(first, row["sops"] * 1e9, time_steps=4), 2) == row["energy (mJ)"]


@pytest.mark.parametrize("name", ["cifar10_T4_B3_32_s0", "cifar10-dvs_T8_B2_128_s0"])
def test_firing_rates_are_those_of_the_released_code(name):
    case = load_case(name)
    report = estimate(case.model("released"), case.input())
    assert_close(np.array([*report.firing_rates.values()]), case.arrays["released.eval.firing_rates"], "firing rates")
    assert report.time_steps == case.about["T"]
    assert report.has_frames == ("dvs" in name)
    assert len(report.summary()["accounts"]) == (2 if report.has_frames else 4)


def by_hand(model, x):
    """Count synaptic operations and multiply-accumulates of one sample from the inputs of the modules."""
    inputs = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, _, name=name: inputs.update({name: args[0]}))
    products = []  # driving spikes [T,B,h,d,N] of the self-attention's two products, block by block
    for block in model.stages[2].blocks:
        block.attn.attend = lambda q, k, v, attend=block.attn.attend: products.extend([k, q]) or attend(q, k, v)
    with torch.no_grad():
        model(x)
    additions, mixed = 0.0, 0.0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() < 2 or name == "stages.0.embed.units.0.conv":
            continue
        value, steps = inputs[name], model.time_steps
        macs = module(value).numel() / len(value) * weight[0].numel()
        is_binary = bool(((value == 0) | (value == 1)).all())
        additions += AC_PJ * value.mean().item() * macs * steps
        steps = 1 if name == "head" else steps  # it is computed once
        mixed += (AC_PJ if is_binary else MAC_PJ) * (value != 0).double().mean().item() * macs * steps
    for spikes in products:
        _, _, heads, width, tokens = spikes.shape
        pj = AC_PJ * spikes.mean().item() * heads * width**2 * tokens * model.time_steps
        additions, mixed = additions + pj, mixed + pj
    return additions * MJ, mixed * MJ


def test_an_estimate_by_hand():
    model = lively(create_model("qkformer_3_64")).eval()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    report = estimate(model, [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(1))])  # a loader, with an odd last batch
    assert report.samples == 3
    assert model.training is False
    additions, mixed = by_hand(model, x)
    first = MAC_PJ * 9 * 8 * 8 * 8 * MJ  # 3x3, 8 channels at 8x8
    assert math.isclose(report.energy(), 4 * first + additions, rel_tol=1e-9)
    assert math.isclose(report.energy(first="once"), first + additions, rel_tol=1e-9)
    assert math.isclose(report.energy("multiplications"), 4 * first + mixed, rel_tol=1e-9)
    assert math.isclose(report.sops * AC_PJ * MJ, additions, rel_tol=1e-9)
    assert mixed > 1.5 * additions  # the two accounts are not the same thing
    for layer in report.layers[1:-1]:  # at 8x8 fewer than 9 outputs read a spike at the border
        is_padded = ".units." in layer.name
        assert (0.7 * layer.sops(4) < layer.exact[0] < layer.sops(4)) if is_padded else layer.exact[1] <= layer.exact[0]
        assert is_padded or "shortcut" in layer.name or math.isclose(layer.exact[0], layer.sops(4), rel_tol=1e-9)
    assert report.layers[-1].exact[0] <= report.layers[-1].macs == 64 * 10  # once, not in 4 steps
    assert {layer.name for layer in report.layers if not layer.is_binary} >= {"stages.2.blocks.0.attn.v.conv", "head"}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), ((2, 1), (0, 2), 1), (1, "same", 2)])
def test_exact_operations_are_those_of_each_spike_by_itself(groups, stride, padding, dilation):
    """Count an input's fan-out as the number of outputs that change with it; the head reads a mean."""
    conv = torch.nn.Conv2d(4, 6, 3, stride, padding, dilation, groups)
    first = torch.nn.Conv2d(4, 4, 1, groups=4, bias=False)
    torch.nn.init.ones_(first.weight)  # the next layer gets its input
    pool = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = torch.nn.ModuleDict({"body": torch.nn.Sequential(first, conv, *pool), "head": torch.nn.Linear(6, 5)})
    model.forward = lambda x: model.head(model.body(x))
    x = torch.randint(0, 4, (2, 4, 5, 6), generator=torch.Generator().manual_seed(0)).float()
    expected = torch.zeros(2)
    with torch.no_grad():
        silence = conv(torch.zeros(1, 4, 5, 6))
        for sample, channel, row, column in x.nonzero().tolist():
            spike = torch.zeros(1, 4, 5, 6)
            spike[0, channel, row, column] = 1
            fan_out = (conv(spike) != silence).sum()
            expected += fan_out * torch.stack([x[sample, channel, row, column], torch.tensor(1.0)])
    assert estimate(model, x).exact_sops == pytest.approx((expected / 2 + 6 * 5).tolist(), rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert estimate(model, x).exact_sops == pytest.approx((expected / 2 + 6 * 5).tolist(), rel=1e-12)


class Products(torch.nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend, self.weight = attend, torch.nn.Parameter(torch.ones(3, 5))

    def forward(self, x):
        return self.attend(torch.nn.functional.linear(x, weight=self.weight), x)


def test_only_known_products_of_any_widths_are_counted():
    model = Products(lambda q, v: torch.nn.functional.scaled_dot_product_attention(q, key=q, value=v))
    report = estimate(model, torch.rand(2, 7, 5))
    assert [layer.macs for layer in report.layers] == [7 * 5 * 3, 7 * 7 * 3 + 7 * 7 * 5]
    with refuses("torch.einsum"):
        estimate(Products(lambda q, v: torch.einsum("bnc,bnd->bcd", q, v)), torch.rand(2, 7, 5))


def test_membrane_shortcuts_have_binary_inputs():
    x = torch.rand(2, 1, 8, 8)
    report = estimate(create_model("qkformer_3_64", residual="ms"), x)
    assert [layer.name for layer in report.layers if not layer.is_binary][:1] == [report.layers[0].name]
    assert {layer.name for layer in report.layers[1:] if not layer.is_binary} <= {"head"}


def test_the_script_measures_while_it_evaluates(tmp_path, monkeypatch, capfd):
    untrained(tmp_path / "best.pt", "digits/digits.yml", "--time-steps", "1")
    test = ["--checkpoint", tmp_path / "best.pt", "--energy", "--eval-batch-size", 40]
    here(monkeypatch, capfd, "digits/test.py", *test)
    alone = result_in(tmp_path)["energy"]
    assert alone["accounts"][0]["energy_mj"] == alone["energy_mj"] > 0
    assert len(alone["accounts"]) == 4
    with (tmp_path / "best.energy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert math.isclose(sum(float(row["energy (mJ)"]) for row in rows), alone["energy_mj"], rel_tol=1e-9)
    content = json.loads((tmp_path / "best.energy.json").read_text())
    assert len(content["layers"]) == len(rows)
    test += ["--output-dir", tmp_path / "two", "--device", "cpu"]
    children = ranks(2, "digits/test.py", *test, log=tmp_path / "log")
    assert [child.wait() for child in children] == [0, 0], children[0].output
    two = result_in(tmp_path / "two")["energy"]
    assert two["samples"] == alone["samples"] == 360
    assert math.isclose(two["energy_mj"], alone["energy_mj"], rel_tol=1e-9)
