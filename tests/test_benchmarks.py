"""Benchmarks at a small size, and their figures from measured times."""

import argparse
import contextlib
import json
import math
import re
import subprocess
from unittest.mock import Mock

import pytest
import torch
from scripts import ROOT, fail, here, refuses

from benchmarks import roofline, speed
from benchmarks.common import Results
from benchmarks.speed import cases, compare, weights
from benchmarks.spikingjelly2 import Remote
from benchmarks.turns import Timed, Turns
from engine.config import load
from engine.log import provenance

TINY = "--device cpu --time-steps 1 --batch-size 2 --input-size 16 --rounds 2 --steps 1".split()
CPU = torch.device("cpu")


def small_case():
    sizes = {"time_steps": 1, "input_size": 8, "batch_size": 2, "ssa_membrane": None}
    (case,) = cases(argparse.Namespace(models=["qkformer_3_64"], amp="off", **sizes), CPU)
    return case


def rounds(run):
    return {result["mode"]: [len(s["ms"]["rounds"]) for s in result["sides"].values()] for result in run["results"]}


def test_the_speed_of_a_step_and_going_on_after_an_interruption(tmp_path, monkeypatch, capfd):
    def measure(stop_at=None):
        """Let turns take 1, 2, 3, ... ms, until turn `stop_at`; return their number and the runs in the file."""
        turns = []

        def turn(self, steps):
            if len(turns) == stop_at:
                raise KeyboardInterrupt
            turns.append(steps)
            return float(len(turns))

        monkeypatch.setattr(Timed, "turn", turn)
        with pytest.raises(SystemExit) if stop_at else contextlib.nullcontext():
            here(monkeypatch, capfd, "benchmarks.speed", "--models", "qkformer_3_64", *TINY, "--output", tmp_path)
        (path,) = tmp_path.glob("speed-*.json")
        return len(turns), json.loads(path.read_text())["runs"]

    monkeypatch.setattr("benchmarks.common.provenance", lambda: {"git_commit": "4d1f"})
    _, runs = measure(stop_at=7)  # in the last round of the evaluation: 2 modes x 2 rounds x 2 sides
    assert [rounds(run) for run in runs] == [{"train": [2, 2], "eval": [1, 1]}]
    count, runs = measure()
    assert count == 4
    assert [rounds(run) for run in runs[1:]] == [{"eval": [2, 2]}]
    assert measure() == (0, runs)
    (result,) = runs[1]["results"]
    assert result["agreement"]["deviation"] < 0.5
    assert list(result["sides"]) == ["unfused-torch", "ours"]  # the compiler runs on request
    ours = result["sides"]["ours"]
    assert ours["ms"] == {"min": 2, "median": 3, "max": 4, "rounds": [2, 4]}
    assert ours["ratio"] == {"min": 1 / 2, "median": 5 / 8, "max": 3 / 4}  # of the baseline's 1 and 3 ms
    assert math.isclose(ours["samples_per_s"], 2000 / 3)
    assert math.isclose(ours["times_floor"], 3 / result["floor_ms"])


def test_earlier_runs_with_the_same_commit_and_arguments_count(tmp_path, monkeypatch):

    def results(commit, **arguments):
        monkeypatch.setattr("benchmarks.common.provenance", lambda: {"git_commit": commit})
        return Results("speed", argparse.Namespace(output=tmp_path, **arguments), CPU, ["rounds"])

    results("4d1f", rounds=2, models=["a"]).write([{"x": 1}])
    assert results("4d1f", rounds=2, models=["b"]).kept == [{"x": 1}]
    assert results("4d1f", rounds=3, models=["a"]).kept == []
    for commit in ("5c3a", "4d1f+changes"):
        file = results(commit, rounds=2)
        assert (file.kept, file.all) == ([], [])
        file.write([{"x": 2}])
        assert bool(results(commit, rounds=2).kept) == (commit == "5c3a")


def test_new_records_are_no_changes_of_the_commit(tmp_path, monkeypatch):
    def git(*words):
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *author, *words], check=True, capture_output=True)

    monkeypatch.setattr("engine.log.ROOT", tmp_path)
    for name in ("benchmarks/results", "docs/results/digits-seed0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "old.json").touch()
    git("init")
    git("add", ".")
    git("commit", "--message", "first")
    (tmp_path / "benchmarks/results/new.json").touch()
    (tmp_path / "docs/results/digits-seed0/new.json").touch()
    assert re.fullmatch("[0-9a-f]{40}", provenance()["git_commit"])
    (tmp_path / "docs/page.md").touch()
    assert re.fullmatch(r"[0-9a-f]{40}\+changes", provenance()["git_commit"])


@pytest.mark.gpu
def test_speed_of_a_step_on_cuda(tmp_path, monkeypatch, capfd):
    flags = ["--models", "qkformer_2_64", *TINY, "--device", "cuda", "--sides", "ours", "ours-graphs"]
    here(monkeypatch, capfd, "benchmarks.speed", *flags, "--output", tmp_path)
    (path,) = tmp_path.glob("speed-*.json")
    (run,) = json.loads(path.read_text())["runs"]
    assert run["device"]["gpu"] == torch.cuda.get_device_name()
    for result, names in zip(run["results"], [{"ours", "ours-graphs"}, {"ours"}], strict=True):
        assert "deviation" in result["agreement"], result["agreement"]
        assert names | {"unfused-cupy"} <= result["sides"].keys()
        for figures in result["sides"].values():
            assert "not_run" not in figures, figures
            assert figures["ms"]["min"] > 0
            assert figures["peak_bytes"] > 0
            assert figures["ratio"]["min"] > 0


class Side:
    peak_bytes, is_closed = None, False

    def __init__(self, *times):
        self.times = iter(times)

    def turn(self, steps):
        return next(self.times)

    def close(self):
        self.is_closed = True


def test_a_side_that_fails_is_out_and_the_others_go_on():
    good, bad = Side(4.0, 6.0), Side(1.0)
    with Turns("some network", CPU) as turns:
        turns.start("cupy", Mock(side_effect=ImportError("No module named 'cupy'")))
        for name, side in (("torch", Side(8.0, 9.0)), ("bad", bad), ("good", good)):
            turns.start(name, Mock(return_value=side))
        for _ in range(2):
            turns.round(1)
        assert (bad.is_closed, good.is_closed) == (True, False)
    assert good.is_closed
    figures = turns.figures(("cupy", "torch", "bad", "good", "not asked for"), "torch", samples=10)
    assert figures["cupy"] == {"not_run": "No module named 'cupy'"}
    assert "not_run" in figures["bad"]
    assert figures["good"]["ratio"] == {"min": 1.5, "median": 1.75, "max": 2.0}
    assert figures["good"]["samples_per_s"] == 2000
    assert "not asked for" not in figures
    assert turns.figures(("good",), "cupy", 10)["good"]["ratio"] is None


def test_demand_counts_a_still_image_once():
    """At two time steps all units count twice, except input and output of the first convolution."""
    pixels = 8 * 8
    for recipe, mode, once in (
        ("digits/digits.yml", "eval", pixels),
        ("digits/digits.yml", "train", 3 * pixels + 8 * 8 * pixels),  # 1 channel in, 8 out
        ("digits-dvs/digits-dvs.yml", "eval", 0),
    ):
        one, two = (roofline.demand(load(ROOT / recipe, [f"--time-steps={t}"]), mode).elements for t in (1, 2))
        assert two == 2 * one - once


def test_demand_of_the_published_network():
    need = roofline.demand(load(ROOT / "imagenet/qkformer_10_384.yml"), "train")
    assert round(need.operations / 1e9) == 141
    rates = roofline.Rates(bytes_per_s=1000, operations_per_s=10)
    assert rates.floor_ms(roofline.Demand(operations=10, elements=1), 3, 2) == 3000
    assert rates.floor_ms(roofline.Demand(operations=1, elements=1000), 3, 2) == 6000


STUB = """
from torch import nn
def qkformer_10_384(T, in_channels, num_classes):
    print("what a library prints")
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
"""


def test_spikingjelly_2_takes_its_turns_in_a_process_of_its_own(tmp_path):
    folder = tmp_path / "spikingjelly/activation_based/model"
    folder.mkdir(parents=True)
    (folder / "qkformer.py").write_text(STUB)
    (folder.parent / "functional.py").write_text("def reset_net(net): pass")
    for package in (folder, folder.parent, folder.parents[1]):
        (package / "__init__.py").touch()
    settings = {"mode": "eval", "amp": "off", "device": "cpu", "precision": False}
    settings |= {"model": "qkformer_3_64", "changes": {"batch_size": 2}}
    remote = Remote(tmp_path, settings)
    assert remote.turn(1) > 0
    assert remote.turn(2) > 0
    with refuses("no number"):
        remote.turn("no number")
    with refuses(0):
        remote._answer()
    remote.close()
    with refuses("spikingjelly"):
        Remote(tmp_path / "nowhere", settings)


@pytest.mark.parametrize(
    ("script", "flags", "value"),
    [
        ("speed", "--models qkformer_9", "qkformer_9"),
        ("speed", "--batch-size 0", "'0'"),
        ("speed", "--input-size 9999", "input_size"),
        ("growth", "--width 64", "--width"),
        ("growth", "--width 64 72", "heads"),
        ("growth", "--axes channels --channels 8 16", "--heads"),
    ],
)
def test_mistakes_are_reported(monkeypatch, capfd, tmp_path, script, flags, value):
    assert value in fail(monkeypatch, capfd, f"benchmarks.{script}", *flags.split(), "--output", tmp_path)


def test_networks_that_disagree_are_not_timed(monkeypatch):
    case = small_case()
    state = weights(case)
    assert compare(case, state)["deviation"] < 0.5
    monkeypatch.setattr(speed, "eval_step", lambda *_: lambda *_: torch.eye(4)[[next(classes), next(classes)]])
    classes = iter([0, 1, 2, 3])
    with refuses("0%"):
        compare(case, state)
