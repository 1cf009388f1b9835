"""Grid of runs: it skips finished runs, reports failed ones and forwards signals."""

import csv
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from scripts import ROOT, Child, fail, here, named
from test_analysis import result

from analysis import grid
from analysis.common import recipes
from analysis.results import by_recipe, differences, read_result, results
from engine import config

TRAIN = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1])
assert sys.argv[-2:] == ["--resume", "auto"]
(folder / "starts").open("a").write("x")
if "7" in sys.argv:
    sys.exit("error: seven")
if "8" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: (folder / "saved").touch() or sys.exit(143))
    (folder / "ready").touch()
    time.sleep(60)
(folder / "metrics.jsonl").write_text('{"seconds": 1.5}\\n{"seconds": 2}\\n')
(folder / "last.pt").touch()
"""
TEST = f"""
import json, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from engine import config
cfg = config.load("", sys.argv[1:])
path = pathlib.Path(cfg.checkpoint)
content = config.plain(cfg) | {{"top1": 90 + cfg.seed, "count": 360, "time": "1"}}
content["energy"] = {{"energy_mj": 0.002, "firing_rate": 0.2}}
path.with_suffix(".test.json").write_text(json.dumps(content))
"""


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe next to scripts that take no time."""
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    (folder / "test.py").write_text(TEST)
    (folder / "digits.yml").write_text((ROOT / "digits/digits.yml").read_text())
    return folder / "digits.yml"


def starts(folder):
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/starts")}


def test_a_grid_resumes_and_skips_finished_runs(recipe, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    command = ["analysis.grid", recipe, "--variants", "recipe", "self", "--output-dir", out, "--seeds"]
    here(monkeypatch, capfd, *command, 0, 2)
    assert starts(out) == dict.fromkeys(["recipe-seed0", "recipe-seed2", "self-seed0", "self-seed2"], 1)
    (out / "self-seed2/last.test.json").write_text("{")  # its evaluation was killed
    named(fail(monkeypatch, capfd, *command, 0, 2, 7), out / "recipe-seed7", out / "self-seed7")
    done = {"recipe-seed0": 1, "recipe-seed2": 1, "self-seed0": 1, "self-seed2": 2}
    assert starts(out) == done | {"recipe-seed7": 1, "self-seed7": 1}
    rows = [*csv.DictReader((out / "grid.csv").open())]
    assert [(row["variant"], row["seeds"], row["top-1 (%)"]) for row in rows] == [
        ("recipe", "0 2", "91.00 ± 1.41"),
        ("self", "0 2", "91.00 ± 1.41"),
    ]
    assert {(row["seconds"], row["energy (mJ)"], row["firing rate"]) for row in rows} == {("4", "0.002", "0.2000")}
    assert [row["parameters"] for row in rows] == ["140,162", "141,538"]
    for flag, key, value in (("--epochs", "epochs", 3), ("--accum-iter", "effective_batch", 48)):
        named(fail(monkeypatch, capfd, *command, 0, "--", flag, 3), "recipe-seed0", key, value)
    named(fail(monkeypatch, capfd, *command, 0, "--", "--data-path", "x"), "recipe-seed0", "data_path", "x")


def test_a_signal_lets_the_run_save(recipe, tmp_path):
    out = tmp_path / "out"
    command = ["-m", "analysis.grid", recipe, "--variants", "recipe", "--seeds", 8, "--output-dir", out]
    child = Child(*command, log=tmp_path / "log")
    while not (out / "recipe-seed8/ready").exists():
        assert child.process.is_alive(), child.output
        time.sleep(0.1)
    os.kill(child.process.pid, signal.SIGTERM)
    assert child.wait() == 143, child.output
    assert (out / "recipe-seed8/saved").exists()


def test_any_runs_side_by_side(tmp_path, monkeypatch, capfd):
    for seed, top1 in enumerate((98.0, 99.0)):
        result(tmp_path / f"a{seed}/best.test.json", top1, seed=seed)
    result(tmp_path / "b/best.test.json", 97.0, epochs=2)
    here(monkeypatch, capfd, "analysis.grid", "--compare", tmp_path, "--output-dir", tmp_path)
    rows = [*csv.DictReader((tmp_path / "grid.csv").open())]
    assert [(row["settings"], row["seeds"], row["top-1 (%)"]) for row in rows] == [
        ("epochs: 8", "0 1", "98.50 ± 0.71"),
        ("epochs: 2", "0", "97.00"),
    ]
    named((tmp_path / "grid.md").read_text(), "analysis.grid --compare", tmp_path)
    assert {row["seconds"] for row in rows} == {""}


def test_a_record_keeps_the_small_files_of_a_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    result(Path("run/last.test.json"), 97.0, recipe="digits", variant="self", seed=1)
    for name in (*grid.RECORDED, "last.pt"):
        (tmp_path / "run" / name).write_text(f'[{{"config": {{"data": "{tmp_path}/data"}}}}]')
    Path("run/metrics.jsonl").write_text(
        '{"seconds": 1, "epoch": 0, "test_top1": 1, "train_loss": 1, "test_loss": 1}\n'
    )
    command = ["analysis.grid", "--compare", "run", "--record"]
    here(monkeypatch, capfd, *command, "records")
    folder = Path("records/digits-self-seed1")
    assert {path.name for path in folder.iterdir()} == {"last.test.json", *grid.RECORDED}
    start = '[{"config": {"data": "data"}}]'  # relative to the working directory
    assert (folder / "run.json").read_text() == start
    here(monkeypatch, capfd, *command, "records", "--curves")
    assert (folder / "curves.png").exists()
    result(Path("again/last.test.json"), 96.0, recipe="digits", variant="self", seed=1)
    for name in ("config.yml", "run.json", "metrics.jsonl"):
        shutil.copy(tmp_path / "run" / name, tmp_path / "again")
    line = fail(monkeypatch, capfd, "analysis.grid", "--compare", "run", "again", "--record", "two")
    named(line, "two/digits-self-seed1")
    result(Path("run/last.test.json"), 90.0, recipe="digits", variant="self", seed=1, epochs=2)
    named(fail(monkeypatch, capfd, *command, "records"), folder, "epochs")
    assert read_result(folder / "last.test.json")["top1"] == 97.0


def test_every_accuracy_in_the_tables_has_a_record():
    """Check that each run in docs/results counts, because the tables come from there (tests/test_readme.py)."""
    folders = sorted((ROOT / "docs/results").iterdir())
    configs = [cfg for path, _ in recipes() for cfg in config.read(path).all() if cfg.num_classes]
    groups = by_recipe(results(folders), configs)
    names = [
        "-".join(filter(None, (Path(cfg.config).stem, cfg.variant, f"seed{result['seed']}")))
        for cfg, group in groups.items()
        for result in group
    ]
    assert sorted(names) == [folder.name for folder in folders]
    for folder in folders:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        measured, start = read_result(folder / "last.test.json"), json.loads((folder / "run.json").read_text())[-1]
        recorded = config.load(folder / "config.yml")
        # hooks of the energy take another path, and rounding there may change an answer, or some of 10,000
        assert last["test_top1"] == pytest.approx(measured["top1"], abs=max(0.05, 101 / measured["count"]))
        assert last["epoch"] + 1 == recorded.epochs + recorded.cooldown_epochs
        assert start["command"][0].endswith("train.py")
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", start["git_commit"])
        assert not differences(measured, config.plain(recorded))
        assert max(path.stat().st_size for path in folder.iterdir()) < 100_000


@pytest.mark.parametrize(
    "words",
    [
        "",
        "absent/digits.yml",
        "digits/digits.yml --variants selfish",
        "--compare absent",
        "digits/digits.yml -- --compile",  # without the energy
    ],
)
def test_what_a_grid_cannot_run_is_refused(words, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    named(fail(monkeypatch, capfd, "analysis.grid", *words.split()), words.split("--")[-1].split(" ")[-1])


def test_counted_classes_are_no_difference():
    wanted = config.plain(config.load(ROOT / "imagenet/own_images.yml"))
    assert not {"num_classes", "effective_batch"} & set(differences({"num_classes": 3, "effective_batch": 8}, wanted))


def test_runs_of_the_first_seed_come_first(tmp_path):
    runs = grid.plan(ROOT / "digits/digits.yml", ["ms", "recipe"], [3, 1], tmp_path, ["--epochs", "2"])
    names = [run.folder.name for run in runs]
    assert names == ["ms-seed3", "recipe-seed3", "ms-seed1", "recipe-seed1"]
    assert runs[0].flags == ["--variant", "ms", "--seed", "3", "--epochs", "2"]
    assert runs[1].flags == ["--seed", "3", "--epochs", "2"]
