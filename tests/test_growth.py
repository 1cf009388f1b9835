"""The growth of the attentions: what is counted is what torch counts, and what is kept is what autograd keeps."""

import csv
import math

import pytest
import torch
from scripts import fail, refuses
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from analysis.growth import MODULES, SERIES, KeptBytes, Setting, counted, exponent, fitted_sizes, point, run

SETTING = Setting(heads=2, time_steps=3, batch_size=2, repeats=1, device=torch.device("cpu"))


def spikes(count, *shape):
    return (torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)) < 0.4).float()


def sizes_of(kind, tokens, channels, part="core"):
    return point(kind, part, tokens, channels, SETTING)


def torch_operations(run, *inputs):
    """What torch counts of a call: multiply-accumulates of products, additions of sums, and the mask upon the key."""
    further = {  # by shapes; torch counts a multiply-accumulate as two
        torch.ops.aten.sum: lambda x, *_, **__: 2 * math.prod(x),
        torch.ops.aten.mul: lambda x, by, *_, **__: 0 if isinstance(by, float) else 2 * math.prod(by),  # not the scale
    }
    with FlopCounterMode(display=False, custom_mapping=further) as counter:
        run(*inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("kind", MODULES)
def test_operations_are_those_that_torch_counts(kind):
    tokens, channels = 5, 12
    attention = MODULES[kind](channels, SETTING.heads)
    leading = SETTING.time_steps, SETTING.batch_size
    attention.attn_lif = nn.Identity()  # neurons are not counted
    inputs = spikes(3 if hasattr(attention, "v") else 2, *leading, SETTING.heads, channels // SETTING.heads, tokens)
    steps = SETTING.time_steps * SETTING.batch_size
    assert torch_operations(attention.attend, *inputs) == steps * sizes_of(kind, tokens, channels)["operations"]
    with FlopCounterMode(display=False) as counter:  # of the module: its products and projections
        attention(spikes(1, *leading, channels, tokens, 1)[0])
    module = sizes_of(kind, tokens, channels, "module")["operations"]
    if not hasattr(attention, "v"):
        module -= 2 * tokens * channels  # no product
    assert counter.get_total_flops() == 2 * steps * module


@pytest.mark.parametrize("kind", MODULES)
def test_the_map_is_what_stands_between_the_tokens(kind):
    """The mask is what the neurons give; of self-attention the map is the first product."""
    tokens, channels = 5, 12
    attention = MODULES[kind](channels, SETTING.heads)
    shapes = []
    if hasattr(attention, "v"):
        with FlopCounterMode(
            display=False,
            custom_mapping={torch.ops.aten.bmm: lambda *_, out_shape, **__: shapes.append(out_shape) or 0},
        ):
            attention.attend(*spikes(3, 1, 1, SETTING.heads, channels // SETTING.heads, tokens))
    else:
        attention.attn_lif.register_forward_hook(lambda _, __, mask: shapes.append(mask.shape))
        attention.attend(*spikes(2, 1, 1, SETTING.heads, channels // SETTING.heads, tokens))
    assert shapes[0].numel() == sizes_of(kind, tokens, channels)["map_elements"]


def test_both_orders_of_self_attention_give_the_same_spikes():
    one, other = (MODULES[kind](32, 2) for kind in ("self", "quadratic"))
    qkv = spikes(3, 4, 2, 2, 16, 9)
    assert one.attend(*qkv).mean() > 0
    assert torch.equal(one.attend(*qkv), other.attend(*qkv))


@pytest.mark.parametrize(
    ("kind", "of_tokens", "of_channels"),
    [("token", 1, 1), ("channel", 1, 1), ("self", 1, 2), ("quadratic", 2, 1)],
)
def test_counted_exponents(kind, of_tokens, of_channels):
    by_tokens = [{"tokens": n, **counted(kind, n, 96, 6)} for n in (16, 64, 256, 1024)]
    by_channels = [{"channels": d, **counted(kind, 64, d, 6)} for d in (96, 192, 384, 768)]
    assert exponent(by_tokens, "tokens", "operations") == of_tokens
    assert exponent(by_channels, "channels", "operations") == of_channels


def test_exponents_are_fitted_to_the_larger_half():
    assert [fitted_sizes(range(1, n + 1)) for n in (2, 3, 4, 5)] == [[1, 2], [2, 3], [3, 4], [3, 4, 5]]
    rows = [{"tokens": n, "time_ms": max(100, n**1.5)} for n in (1, 2, 100, 400)]
    assert exponent(rows, "tokens", "time_ms") == 1.5


def test_kept_bytes_count_each_storage_once_and_no_parameter():
    x, weight = torch.ones(10, requires_grad=True), nn.Parameter(torch.ones(10))
    kept = KeptBytes([weight])
    with kept:
        (x * weight) * x[None]  # keeps x twice, the weight and the first product
    assert kept.total == 2 * 10 * 4


def test_kept_bytes_of_token_attention_are_the_key_the_mask_and_its_membrane():
    tokens, channels, leading = 7, 8, SETTING.time_steps * SETTING.batch_size
    kept = sizes_of("token", tokens, channels)["kept_bytes"]
    assert kept == 4 * leading * (channels * tokens + 2 * SETTING.heads * tokens)


@pytest.mark.parametrize(("part", "kind"), SERIES)
def test_kept_bytes_grow(part, kind):
    kept = [sizes_of(kind, *size, part)["kept_bytes"] for size in ((4, 8), (16, 8), (16, 32))]
    assert 0 < kept[0] < kept[1] < kept[2]


def test_the_script(tmp_path):
    sizes = "--tokens 9 4 16 --channels 8 16 --at-tokens 4 --at-channels 8 --heads 2 --repeats 1 --device cpu".split()
    run([*sizes, "--output-dir", str(tmp_path / "new")])
    rows = list(csv.DictReader((tmp_path / "new/growth.csv").open()))
    assert len(rows) == (3 + 2) * len(SERIES)
    assert all(float(row["time_ms"]) > 0 for row in rows)


def test_too_large_a_map_is_told():
    setting = SETTING._replace(time_steps=1, batch_size=1)
    with refuses(2_000_000):
        point("quadratic", "core", 2_000_000, 2, setting)


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ("--tokens 4", "--tokens"),
        ("--channels 8 0", "'0'"),
        ("--heads 5", "--heads"),
        ("--token 4 9", "--token"),
    ],
)
def test_mistakes_end_in_one_line(monkeypatch, capfd, tmp_path, flags, value):
    flags = [*flags.split(), "--output-dir", tmp_path]
    assert value in fail(monkeypatch, capfd, "analysis.growth", *flags)
