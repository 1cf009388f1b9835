"""Figures of the analyses against other counts, and the files that their scripts write."""

import csv
import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import sklearn.model_selection
import torch
from scripts import ROOT, fail, here, named, refuses
from test_models import lively

from analysis import (
    attention_masks,
    attention_statistics,
    common,
    curves,
    firing_rates,
    membrane,
    results,
    spikes,
    tables,
)
from analysis.energy import estimate
from engine import checkpoint, config
from engine.cli import UserError
from engine.config import read
from engine.run import build_model
from models import LIF
from models.attention import ChannelQKAttention, SpikingSelfAttention, TokenQKAttention
from models.backends import BACKENDS


def untrained(path, recipe, *flags):
    """Save the checkpoint of an untrained network whose neurons fire."""
    cfg = config.load(ROOT / recipe, flags)
    content = {key: {} for key in checkpoint.ENTRIES}
    content |= {"epoch": 1, "config": config.plain(cfg, without=config.LOCAL_FIELDS)}
    checkpoint.save(path, content | {"state_dict": lively(build_model(cfg)).float().state_dict()})
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Save a checkpoint of the digits' network in its own folder."""

    def make(name, *flags):
        return untrained(tmp_path_factory.mktemp(name) / "best.pt", "digits/digits.yml", "--time-steps", "2", *flags)

    return make


@pytest.fixture(scope="module")
def all_kinds(trained):
    return trained("all", "--attention", "token", "channel", "self")


def subject(path, *flags):
    return common.subject(path, ["--device", "cpu", *flags])


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_samples_may_come_from_all_over_the_test_set(all_kinds):
    loaded = subject(all_kinds, "--eval-batch-size", "50")
    everything, labels = loaded.samples(1000)
    assert len(labels) == 360
    assert torch.equal(loaded.samples(70)[0], everything[:70])
    images, some = loaded.samples(50, spread=True)  # 8 batches of 50 make every eighth
    assert torch.equal(images, everything[::8][:50])
    assert torch.equal(some, labels[::8][:50])
    assert torch.equal(loaded.samples(220, spread=True)[0], everything[::2])  # to the end


@pytest.mark.parametrize(("flags", "backend"), [([], "torch"), (["--lif-backend", "auto"], "auto")])
def test_analyses_compute_the_neurons_with_torch_unless_a_flag_says_otherwise(all_kinds, flags, backend):
    neurons = [module for module in subject(all_kinds, *flags).model.modules() if isinstance(module, LIF)]
    assert {neuron.function for neuron in neurons} == {BACKENDS[backend]}


def test_firing_rates_and_integers_are_those_of_the_layers_inputs(all_kinds):
    loaded = subject(all_kinds)
    report, rates = estimate(loaded.model, loaded.data.test), firing_rates.measure(loaded)
    assert list(rates.spikes) == list(report.firing_rates)
    for name, values in rates.spikes.items():
        assert values.shape == (2,)
        assert math.isclose(values.mean(), report.firing_rates[name], rel_tol=1e-9)
        assert values.max() > 0
    inputs = {layer.name: layer for layer in report.layers}
    pairs = {"embed": "blocks.0.attn.q.conv", "blocks.0.attn": "blocks.0.mlp.fc1.conv"}
    for stage, (before, after) in itertools.product(range(3), pairs.items()):
        shares, layer = rates.integers[f"stages.{stage}.{before}"], inputs[f"stages.{stage}.{after}"]
        assert math.isclose(shares.sum(), 1, rel_tol=1e-6)
        assert math.isclose((shares * torch.arange(len(shares))).sum(), layer.mean_input, rel_tol=1e-6)
        assert math.isclose(1 - shares[0], layer.density, rel_tol=1e-6)
    assert len(rates.masked) == 2
    for name, values in rates.masked.items():
        assert math.isclose(values.mean(), inputs[f"{name}.conv"].mean_input, rel_tol=1e-6)


def test_the_tables_of_firing_rates(all_kinds, tmp_path, monkeypatch, capfd):
    rates = firing_rates.measure(subject(all_kinds))
    here(monkeypatch, capfd, "analysis.firing_rates", "--checkpoint", all_kinds, "--output-dir", tmp_path, "--table")
    for row, (name, values) in zip(rows_of(tmp_path / "firing_rates.csv"), rates.spikes.items(), strict=True):
        assert row["layer"] == name
        assert [float(row["t = 0"]), float(row["t = 1"])] == pytest.approx(values.tolist())
    layers = common.published("firing_rates")["layers"]
    table = {(row["stage"], row["layer"]): row for row in rows_of(tmp_path / "firing_rates_table.csv")}
    assert [layer for stage, layer in table if stage == "1"] == [name for name in layers if name != "V"]
    assert [layer for stage, layer in table if stage == "3"] == [name for name in layers if name != "masked key"]
    rate = rates.masked["stages.1.blocks.0.attn.proj"].mean().item()
    assert float(table["2", "masked key"]["firing rate"]) == pytest.approx(rate)
    (paper,) = [name for name in table["1", "Q"] if "paper" in name]
    assert [table[key][paper] for key in (("1", "Q"), ("2", "MLP 2"), ("3", "Q"))] == ["0.0432", "0.1869", ""]
    assert len(rows_of(tmp_path / "integers.csv")) == 9
    assert (tmp_path / "firing_rates.png").exists()


def test_membrane_shortcuts_have_no_integers(trained):
    loaded = subject(trained("ms", "--residual", "ms"))
    loaded.cfg = dataclasses.replace(loaded.cfg, residual="sew")  # the default, as in settings of rivals
    rates = firing_rates.measure(loaded)
    assert rates.integers == {}
    assert set(rates.spikes) == {name for name, module in loaded.model.named_modules() if isinstance(module, LIF)}


def test_spikes_and_energy_of_a_sample(all_kinds, tmp_path, monkeypatch, capfd):
    loaded = subject(all_kinds)
    sample = loaded.samples(1)[0]
    layers, answer = spikes.measure(loaded, sample)
    report = estimate(loaded.model, sample)
    assert [layer.shape for layer in layers.values()][:2] == [(2, 8, 8)] * 2
    assert len(layers) == 6
    for name, layer in layers.items():
        assert math.isclose(layer.mean(), report.firing_rates[name], rel_tol=1e-6, abs_tol=1e-9)
    assert answer == loaded.model(sample).argmax().item()
    parts = spikes.energies(loaded, sample)
    assert len(parts) == 3 * 3 + 1
    assert math.isclose(sum(parts.values()), 1000 * report.energy_mj)
    events = untrained(tmp_path / "events.pt", "digits-dvs/digits-dvs.yml", "--time-steps", "2")
    for path in (all_kinds, events):
        command = ["analysis.spikes", "--checkpoint", path, "--output-dir", tmp_path / path.stem]
        here(monkeypatch, capfd, *command)
        assert (tmp_path / path.stem / "spikes.png").exists()
    named(fail(monkeypatch, capfd, *command, "--sample", 360), 360)


@pytest.mark.parametrize(
    ("kind", "module", "rates"),
    [
        ("Q-K token", TokenQKAttention, [0.3, 0.2]),
        ("Q-K channel", ChannelQKAttention, [0.3, 0.2]),
        ("self", SpikingSelfAttention, [0.3, 0.2, 0.4]),
    ],
)
def test_the_statistics_of_independent_spikes(kind, module, rates):
    generator, width, tokens, heads = torch.Generator().manual_seed(0), 6, 5, 2
    drawn = ((torch.rand(1, 20_000, heads, width, tokens, generator=generator) < rate).float() for rate in rates)
    module, sums = module(heads * width, heads), []
    module.attn_lif.register_forward_pre_hook(lambda _, args: sums.append(args[0].double()))
    module.attend(*drawn)
    mean, variance = attention_statistics.independent(kind, rates, width, tokens)
    scale = 0.125 if kind == "self" else 1
    assert math.isclose(sums[0].mean() / scale, mean, rel_tol=0.01)
    assert math.isclose(sums[0].var() / scale**2, variance, rel_tol=0.03)


def test_the_papers_bound_of_the_variance():
    """Sums of independent terms stay below the bound; terms of self-attention share spikes and exceed it."""
    independent, bound = attention_statistics.independent, attention_statistics.bound
    assert (bound("Q-K token", 64, 196), bound("Q-K channel", 64, 196), bound("self", 64, 196)) == (16, 49, 3136)
    for kind in ("Q-K token", "Q-K channel"):
        variances = [independent(kind, [rate / 10, 0.3], 64, 196)[1] for rate in range(11)]
        assert max(variances) == variances[5] == bound(kind, 64, 196)
    assert independent("self", [0.05, 0.05, 0.05], 64, 196)[1] < bound("self", 64, 196)
    assert independent("self", [0.5, 1, 1], 64, 196)[1] == pytest.approx(196**2 * 64 / 4)


def test_statistics_of_attention(all_kinds, tmp_path, monkeypatch, capfd):
    arguments = ["--checkpoint", all_kinds, "--output-dir", tmp_path, "--eval-batch-size", 100]  # the last has 60
    here(monkeypatch, capfd, "analysis.attention_statistics", *arguments)
    rows = rows_of(tmp_path / "attention_statistics.csv")
    kinds = [row["attention"] for row in rows]
    assert kinds == ["Q-K token", "Q-K channel", "self scaled", "self unscaled"]
    values = [{key: float(row[key]) for key in ("mean", "variance", "independent mean", "N", "d")} for row in rows]
    assert [(row["N"], row["d"]) for row in values] == [(64, 2), (16, 4), (4, 8), (4, 8)]
    for row in values[:2]:
        assert math.isclose(row["mean"], row["independent mean"], rel_tol=1e-6)  # a sum's mean is n f_q in any case
    assert math.isclose(values[3]["mean"], 8 * values[2]["mean"], rel_tol=1e-9)
    assert math.isclose(values[3]["variance"], 64 * values[2]["variance"], rel_tol=1e-9)
    loaded = subject(all_kinds)
    for stage, value in zip(loaded.model.stages, values, strict=False):
        sums = []
        neuron = stage.blocks[0].attn.attn_lif
        neuron.register_forward_pre_hook(lambda _, args, sums=sums: sums.append(args[0].double()))
        with torch.no_grad():
            loaded.model(loaded.samples(360)[0])
        assert math.isclose(value["mean"], sums[0].mean(), rel_tol=1e-6)
        assert math.isclose(value["variance"], sums[0].var(correction=0), rel_tol=1e-6)
    assert (tmp_path / "attention_statistics.png").exists()


def test_statistics_of_an_attention_without_a_formula_are_an_error(all_kinds, monkeypatch):
    monkeypatch.delitem(attention_statistics.KINDS, ChannelQKAttention)
    with pytest.raises(UserError, match="ChannelQKAttention"):
        attention_statistics.measure(subject(all_kinds))


def test_hooks_end_with_a_failed_forward_pass(all_kinds):
    loaded = subject(all_kinds)
    images = loaded.samples(2)[0]
    with pytest.raises(RuntimeError):
        attention_masks.measure(loaded, images[:, :, :, :0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())


def test_masks_are_those_of_the_spikes():
    token = torch.zeros(2, 1, 2, 1, 6)  # [T,B,h,1,N]: token 4 passes in one head at one step, token 1 always
    token[0, 0, 0, 0, 4] = 1
    token[..., 1] = 1
    mask = attention_masks._mask("b", TokenQKAttention, token, token.expand(2, 1, 2, 3, 6), (2, 3))
    assert (mask.kind, mask.over_image.tolist()) == ("token", [[[0, 1, 0], [0, 0.25, 0]]])
    assert mask.passing.tolist() == pytest.approx([1.25 / 6])
    single = attention_masks._mask("b", TokenQKAttention, token[..., 1:2], token[..., 1:2], (1, 1))
    assert (single.kind, single.over_image.tolist()) == ("token", [[[1]]])  # one token looks like one channel
    channel = torch.zeros(2, 1, 2, 3, 1)  # [T,B,h,d,1]: one of six channels is open in both steps
    channel[:, 0, 1, 2] = 1
    key = torch.zeros(2, 1, 2, 3, 6)
    key[:, 0, 1, 2, 5] = 1
    mask = attention_masks._mask("b", ChannelQKAttention, channel, channel * key, (2, 3))
    assert mask.kind == "channel"
    assert mask.of_channels.tolist() == [[0, 0, 0, 0, 0, 1]]
    assert mask.over_image[0, 1, 2].item() == pytest.approx(1 / 6)
    assert mask.over_image.sum().item() == pytest.approx(1 / 6)


def test_masks_are_drawn_over_the_input(all_kinds, trained, tmp_path, monkeypatch, capfd):
    arguments = ["--checkpoint", all_kinds, "--output-dir", tmp_path, "--samples", 3]
    here(monkeypatch, capfd, "analysis.attention_masks", *arguments)
    masks = attention_masks.measure(subject(all_kinds), subject(all_kinds).samples(3)[0])
    assert [(mask.kind, mask.over_image.shape) for mask in masks] == [("token", (3, 8, 8)), ("channel", (3, 4, 4))]
    assert 0 < masks[0].passing[0] < 1
    assert (tmp_path / "attention_masks.png").exists()
    path = trained("self", "--attention", "self", "self", "self")
    line = fail(monkeypatch, capfd, "analysis.attention_masks", "--checkpoint", path, "--device", "cpu")
    named(line, path)


def test_the_membrane_study(trained, tmp_path, monkeypatch, capfd):
    """Both membranes agree at batch size 1; with other samples only the released one depends on them."""
    split = sklearn.model_selection.train_test_split
    few = lambda *args, **kwargs: [part[:24] for part in split(*args, **kwargs)]  # noqa: E731
    monkeypatch.setattr(sklearn.model_selection, "train_test_split", few)
    leaking = trained("released", "--ssa-membrane", "released")
    arguments = ["--checkpoint", leaking, "--output-dir", tmp_path, "--batch-sizes", 1, 12, "--shuffles", 2]
    here(monkeypatch, capfd, "analysis.membrane", *arguments)
    rows = rows_of(tmp_path / "membrane.csv")
    assert len(rows) == 2 * 2 * 3  # membranes, batch sizes, kinds of order
    for row in rows:
        if row["order"] == "random":
            moves = float(row["probability that moves"])
            assert (moves > 1e-6) == (row["evaluated"] == "released" and row["batch size"] == "12")
        if row["batch size"] == "1" or row["evaluated"] == "per_sample":
            assert {other["top1"] for other in rows if other["batch size"] == "1"} == {row["top1"]}
    assert {float(row["answers that change"]) for row in rows if row["evaluated"] == "per_sample"} == {0}
    assert (tmp_path / "membrane.png").exists()
    for path in trained("ms", "--residual", "ms"), trained("rival", "--model", "spikformer_3_64"):
        line = fail(monkeypatch, capfd, "analysis.membrane", "--checkpoint", path, "--device", "cpu")
        named(line, path)


def test_the_table_in_the_docs_is_that_of_its_figures():
    rows = rows_of(ROOT / "docs/membrane.csv")
    for row in rows:
        row |= {key: float(row[key]) for key in ("top1", *membrane.CHANGES)} | {"batch size": int(row["batch size"])}
    assert membrane.table(membrane.averages(rows)) in (ROOT / "docs/membrane.md").read_text()
    assert {row["answers that change"] for row in rows if row["evaluated"] == "per_sample"} == {0.0}


def test_every_checkpoint_has_a_name_of_its_own():
    assert common.short_names([Path("a/best.pt"), Path("b/best.pt")]) == ["a", "b"]
    assert common.short_names([Path("a/best.pt"), Path("a/last.pt")]) == ["a-best", "a-last"]
    with refuses():
        common.short_names([Path("x/a/best.pt"), Path("y/a/best.pt")])


def test_files_of_the_user_are_no_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/train.py").touch()
    (tmp_path / "digits/broken.yml").write_text("lr: fast")
    (tmp_path / "digits/digits.yml").write_text((ROOT / "digits/digits.yml").read_text())
    assert [path.name for path, _ in common.recipes()] == ["digits.yml"]


def test_flags_have_two_spellings(all_kinds, tmp_path):
    for flag in ("--output-dir", "--output_dir"):
        args, _ = common.subjects("", ["--checkpoint", str(all_kinds), flag, str(tmp_path / "new_folder")])
        assert args.output_dir == tmp_path / "new_folder"


def test_images_in_folders_take_the_recipe_of_their_network_else_one_of_imagenet():
    for model, folder in (("qkformer_4_256", "cifar10"), ("qkformer_3_64", "imagenet"), ("qkformer_4_384", "imagenet")):
        state = {"format": "qkformer", "config": {"dataset": "imagefolder", "model": model}}
        assert common._recipe_of(state, Path("best.pt"), []).parent.name == folder


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ("--checkpoint foreign.pt", "--config"),
        ("--checkpoint foreign.pt --config digits", "foreign.pt"),
        ("--checkpoint absent.pt", "absent.pt"),
        ("", "--checkpoint"),
    ],
)
def test_a_checkpoint_without_recipe_or_weights_is_refused(tmp_path, monkeypatch, capfd, flags, value):
    monkeypatch.chdir(tmp_path)
    torch.save({"head.weight": torch.zeros(2, 2)}, "foreign.pt")
    assert value in fail(monkeypatch, capfd, "analysis.firing_rates", *flags.split())


def test_curves_of_logs_and_runs(tmp_path, monkeypatch, capfd):
    named(fail(monkeypatch, capfd, "analysis.curves", "--output", tmp_path / "run-0.1"), "run-0.1", ".png")
    lengths = {name: (curve.epochs[0], curve.epochs[-1]) for name in curves.LOGS for curve in [curves.published(name)]}
    assert lengths.pop("imagenet_768_384") == (202, 210)
    assert lengths == {"imagenet_768_224": (1, 200), "cifar10": (1, 410), "cifar100": (1, 408), "cifar10-dvs": (1, 106)}
    rows = [{"epoch": i, "lr": 1, "train_loss": 3 - i, "test_loss": 2.5, "test_top1": 40 + i} for i in range(2)]
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = []
    monkeypatch.setattr(curves, "draw", lambda *args, draw=curves.draw: drawn.append(args[0]) or draw(*args))
    runs = [str(tmp_path / name / "run") for name in ("a", "b")]
    curves.run([*runs, "--published", "cifar10", "--output", str(tmp_path / "new/curves.png")])
    assert [curve.name for curve in drawn[0]][1:] == [str(Path("a/run")), str(Path("b/run"))]
    assert drawn[0][1][1:] == ([1, 2], [40, 41], {"train": [3, 2], "test": [2.5, 2.5]})
    assert (tmp_path / "new/curves.png").exists()
    named(fail(monkeypatch, capfd, "analysis.curves", tmp_path), tmp_path)


def result(path, top1, count=360, **changes):
    """Write a record as test.py does for the digits."""
    path.parent.mkdir(exist_ok=True)
    settings = config.plain(config.load(ROOT / "digits/digits.yml"), without=["energy"])
    path.write_text(json.dumps({"top1": top1, "count": count, **settings, "time": "2026-01-01", **changes}))


NO_RESULTS = {
    "cut": "{",
    "list": "[]",
    "nan": '{"top1": NaN, "count": 360, "dataset": "digits", "model": "m", "time": "2026"}',
    "energy": '{"top1": 9, "count": 360, "dataset": "digits", "model": "m", "time": "2026", "energy": 5}',
    "no_time": '{"top1": 9, "count": 360, "dataset": "digits", "model": "m"}',
}


@pytest.mark.parametrize(
    ("values", "others", "expected", "text"),
    [
        ([3.0, 3.2, 3.1], [1.0, 1.2, 1.1], 0.1, "+2.00 ± 0.16: holds"),
        ([3.0, 3.2, 3.1], [1.0, 1.2, 1.1], -0.1, "+2.00 ± 0.16: reversed"),
        ([3.0, 1.0, 2.0], [1.0, 3.0, 1.7], 0.1, "+0.10 ± 1.65: undecided"),
        ([3.0], [1.0, 1.2], 0.1, "+1.90: undecided"),
        ([3.0, 3.0], [], 0.1, ""),
        ([3.0, 3.0], [1.0, 1.0], None, ""),
    ],
)
def test_a_difference_decides_beyond_2_standard_errors(values, others, expected, text):
    assert results.verdict(values, others, expected) == text


def test_tables_hold_what_was_published_and_measured_and_no_more(tmp_path, monkeypatch, capfd):
    result(tmp_path / "a/best.test.json", 98.0, energy={"energy_mj": 0.00125}, time="2026-01-02")
    result(tmp_path / "a/last.test.json", 11.0)  # older
    steps = {"seed": 1, "batch_size": 16, "accum_iter": 2, "save_steps": 500}  # no other accuracy
    result(tmp_path / "b/best.test.json", 99.0, **steps)
    result(tmp_path / "copy/best.test.json", 99.0, **steps, data_path="data", command=["digits/test.py"])
    result(tmp_path / "large_batch/best.test.json", 13.0, effective_batch=32)
    result(tmp_path / "tuned/best.test.json", 13.0)
    (tmp_path / "tuned/run.json").write_text('[{"config": {"finetune": "best.pt"}}]')
    result(tmp_path / "part/best.test.json", 12.0, count=100)
    result(tmp_path / "short/best.test.json", 14.0, epochs=2)
    result(tmp_path / "another_network/best.test.json", 13.0, attention=["self", "self", "token"])
    result(tmp_path / "variant/best.test.json", 97.0, attention=["self", "self", "self"])
    result(tmp_path / "another_size/best.test.json", 13.0, input_size=16)
    folder = config.plain(config.load(ROOT / "cifar10/cifar10_cpu.yml"), without=["energy", "time"])
    result(tmp_path / "my_folder/best.test.json", 13.0, **folder)  # 360 images instead of 10,000
    (tmp_path / "untested").mkdir()
    (tmp_path / "untested/metrics.jsonl").touch()
    for name, text in NO_RESULTS.items():
        (tmp_path / f"{name}.test.json").write_text(text)
    monkeypatch.setattr(tables, "size", lambda *_: {"parameters": "1", "MACs a step": "1.00 M"})  # test_readme counts
    tables.run(["--results", str(tmp_path), "--output-dir", str(tmp_path / "out")])
    printed = capfd.readouterr().out
    left_out = [line.split(": left out")[0] for line in printed.splitlines() if ": left out" in line]
    folders = ("a/last", "copy/best", "part/best", "short/best", "another_network/best", "another_size/best")
    folders += ("my_folder/best", "large_batch/best", "tuned/best")
    names = [*folders, *NO_RESULTS]
    assert left_out.pop(0) == str(tmp_path / "untested")
    assert sorted(left_out) == sorted(str(tmp_path / f"{name}.test.json") for name in names)
    named(printed, "epochs is 2", "input_size is 16", "effective_batch is 32")  # with the reason
    written = {
        name: rows_of(tmp_path / f"out/{name}.csv")
        for name in ("imagenet", "imagenet_others", "small", "small_others", "ablations", "ablations_here", "orders")
    }
    for name in ("imagenet", "small"):
        measured = [row["network"] for row in written[name] if row["top-1 (%) here"] or row["energy (mJ) here"]]
        assert measured == {"imagenet": [], "small": ["qkformer_3_64"]}[name]
    digits = next(row for row in written["small"] if row["data set"] == "digits")
    assert digits["top-1 (%) here"] == "98.50 ± 0.71 (2 runs)"
    assert digits["energy (mJ) here"] == "0.00125"
    large = written["imagenet"][0]
    assert large["network"] == "qkformer_10_384"
    assert (large["top-1 (%) paper"], large["top-1 (%) log"], large["energy (mJ) paper"]) == ("78.80", "78.85", "15.13")
    assert written["imagenet"][4]["top-1 (%) paper"] == "85.65 (top-5 97.74)"
    for row in written["imagenet_others"]:
        assert row["top-1 (%) paper"]
        is_here = "not spiking" in row["network"] or "ormer-8-" in row["network"]
        assert bool(row["parameters"]) == is_here
        assert row["network"].endswith("(not spiking)") != bool(row["T"])
    assert written["small_others"][-1]["network"] == "QKFormer"
    assert [written["small_others"][-1][f"{name} paper"] for name in ("CIFAR-10", "CIFAR10-DVS")] == ["96.18", "84.00"]
    unverified = [row for row in written["small"] if "to be verified" in row["top-1 (%) paper"]]
    assert [(row["data set"], row["T"]) for row in unverified] == [("CIFAR10-DVS", "10")]
    keys = ("recipe", "--variant", "runs here", "top-1 (%) here", "top-1 (%) paper")
    assert [tuple(row[key] for key in keys) for row in written["ablations_here"]] == [
        ("digits", "", "2", "98.50 ± 0.71", "81.15 (CIFAR-100)"),
        ("digits", "self", "1", "97.00", "81.23 (CIFAR-100)"),
    ]
    (order,) = [row for row in written["orders"] if row["digits here"]]
    assert (order["CIFAR-100 paper"], order["digits here"]) == ("+0.08", "-1.50: undecided")
    assert not any(row["CIFAR-100: top-1 (%) here"] for row in written["ablations"])
    variants = {cfg.variant or "" for cfg in read(ROOT / "cifar100/cifar100.yml").all() if cfg.variant != cfg.model}
    assert {row["--variant"] for row in written["ablations"]} == variants
    paper = {row["--variant"]: row["CIFAR10-DVS: top-1 (%) paper"] for row in written["ablations"]}
    assert (paper["channel_self"], paper["spikformer_speds"], paper["ms"]) == ("84.30", "82.20", "")
    assert set(results.TEST_SAMPLES) == {results.data_key(cfg) for _, cfg in common.recipes() if cfg.num_classes}
    tables.run(["--results", str(tmp_path / "untested"), "--output-dir", str(tmp_path / "none")])  # without results
    files = [{path.name for path in (tmp_path / folder).glob("*.csv")} for folder in ("out", "none")]
    assert files[0] - files[1] == {"ablations_here.csv"}
    absent = tmp_path / "absent"
    named(fail(monkeypatch, capfd, "analysis.tables", "--results", absent), absent)
