"""Growth of attentions and networks: operations as torch counts them, bytes as autograd keeps them."""

import json
import math

import pytest
import torch
from scripts import here
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from analysis import attentions
from analysis.attentions import MODULES, PARTS, Attention, peak_bytes
from benchmarks.growth import exponent, exponents, fitted_sizes
from benchmarks.turns import kept_bytes

TOKENS, CHANNELS, HEADS = 5, 12, 2


def spikes(count, *shape):
    return (torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)) < 0.4).float()


def torch_operations(run, *inputs):
    """Count multiply-accumulates of products, additions of sums, and the mask upon the key."""
    further = {  # by shapes; torch counts a multiply-accumulate as two
        torch.ops.aten.sum: lambda x, *_, **__: 2 * math.prod(x),
        torch.ops.aten.mul: lambda x, by, *_, **__: 0 if isinstance(by, float) else 2 * math.prod(by),  # not the scale
    }
    with FlopCounterMode(display=False, custom_mapping=further) as counter:
        run(*inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("kind", MODULES)
def test_operations_are_those_that_torch_counts(kind):
    module = MODULES[kind](CHANNELS, HEADS)
    module.attn_lif = nn.Identity()  # neurons are not counted
    inputs = spikes(3 if hasattr(module, "v") else 2, 3, 2, HEADS, CHANNELS // HEADS, TOKENS)  # T = 3, B = 2
    core, whole = (Attention(kind, part, TOKENS, CHANNELS, HEADS).operations() for part in PARTS)
    assert torch_operations(module.attend, *inputs) == 6 * core
    with FlopCounterMode(display=False) as counter:  # of the module: its products and projections
        module(spikes(1, 3, 2, CHANNELS, TOKENS, 1)[0])
    products = whole if hasattr(module, "v") else whole - 2 * TOKENS * CHANNELS
    assert counter.get_total_flops() == 2 * 6 * products


@pytest.mark.parametrize(
    ("kind", "of_tokens", "of_channels"),
    [("token", 1, 1), ("channel", 1, 1), ("self", 1, 2), ("quadratic", 2, 1)],
)
def test_exponents_of_the_counted_operations(kind, of_tokens, of_channels):
    tokens = [{"size": n, "x": Attention(kind, "core", n, 96, 6).operations()} for n in (16, 64, 256)]
    channels = [{"size": d, "x": Attention(kind, "core", 64, d, 6).operations()} for d in (96, 192, 384)]
    assert (exponent(tokens, "x"), exponent(channels, "x")) == (of_tokens, of_channels)


def test_both_orders_of_self_attention_give_the_same_spikes():
    modules = [MODULES[kind](32, 2) for kind in ("self", "quadratic")]
    first, second = (module.attend(*spikes(3, 4, 2, 2, 16, 9)) for module in modules)
    assert first.mean() > 0
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", MODULES)
def test_counted_bytes_are_those_of_the_results(kind):
    """Compare with the peak of a forward pass without neurons; self-attention also holds the scaled product."""
    attention = Attention(kind, "core", TOKENS, CHANNELS, HEADS)
    module = attention.module()
    module.attn_lif = nn.Identity()
    inputs = attention.spikes(attention.inputs)
    scaled = 4 * TOKENS * CHANNELS if attention.inputs == 3 else 0
    assert peak_bytes(module.attend, *inputs) == attention.counted_bytes() + scaled <= attention.measured_bytes()


def test_peak_memory_forgets_what_is_freed():
    def make():
        for _ in range(3):
            x = torch.zeros(100)
            x.add_(1).view(4, 25)  # no new storage

    assert peak_bytes(make) == 2 * 400  # the next tensor is made before the last is freed


def test_memory_decodes_the_papers_figures():
    (row,) = [row for row in attentions.memory() if row["N"] == 2500]
    paper = {key.split(":")[0]: value for key, value in row.items() if "paper" in key}
    assert len(paper) == 2
    for kind, value in paper.items():
        assert row[f"{kind}: counted"] == pytest.approx(value, rel=0.01)


def test_exponents_are_fitted_to_the_larger_half():
    assert [fitted_sizes(range(1, n + 1)) for n in (2, 3, 4, 5)] == [[1, 2], [2, 3], [3, 4], [3, 4, 5]]
    rows = [{"size": n, "ms": max(100, n**1.5)} for n in (1, 2, 100, 400)]
    assert exponent(rows, "ms") == 1.5
    assert exponent(rows[:1], "ms") is None


def test_kept_bytes_count_each_storage_once_and_no_parameter():
    x, weight = torch.ones(10, requires_grad=True), nn.Parameter(torch.ones(10))
    assert kept_bytes(lambda: (x * weight) * x[None], [weight]) == 2 * 10 * 4  # x twice, the weight, the first product


def test_the_script(tmp_path, monkeypatch, capfd):
    flags = "--tokens 9 4 --channels 8 16 --at-tokens 4 --at-channels 8 --heads 2 --rounds 1 --steps 1 --device cpu"
    network = "--model qkformer_2_64 --batch-size 2 4 --at-time-steps 1 --at-input-size 16 --at-width 32"
    axes = ["--axes", "tokens", "channels", "batch_size"]
    here(monkeypatch, capfd, "benchmarks.growth", *axes, *flags.split(), *network.split(), "--output", tmp_path)
    (path,) = tmp_path.glob("growth-*.json")
    (run,) = json.loads(path.read_text())["runs"]
    series = {(part, kind) for part in PARTS for kind in PARTS[part]}
    networks = {(mode, side) for mode in ("train", "eval") for side in ("unfused-torch", "ours")}
    lines = exponents(run["results"])
    assert {(line["mode"], line["side"]) for line in lines} == series | networks
    assert len(run["results"]) == (2 + 2) * len(series) + 2 * len(networks)
    assert all(row["ms"] > 0 for row in run["results"])
    for line in (line for line in lines if line["mode"] == "train"):
        assert line["fitted"] == [2, 4]
        assert 0.8 < line["memory_bytes"] < 1.2
    assert path.with_suffix(".png").exists()
