"""Scripts as a user runs them."""

import json
import re
import signal

import pytest
import torch
from scripts import ROOT, fail, here, named, ranks, result_in, rows_in, run, same, signal_at_step, succeed

from engine import checkpoint
from models import backends

QUICK = "--batch-size 240 --lr 1e-2 --warmup-epochs 0 --time-steps 1".split()  # 5 steps an epoch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train three epochs of the recipe, with fewer steps, for all tests of this file."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    succeed("digits/train.py", "--output-dir", folder, *"--epochs 3 --time-steps 1 --batch-size 32 --lr 1e-2".split())
    return folder


def test_three_epochs_learn_the_digits(trained):
    rows = rows_in(trained)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert rows[-1]["test_top1"] >= 50
    assert rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"]


def test_a_run_leaves_its_records(trained):
    names = "config.yml run.json metrics.jsonl last.pt best.pt tensorboard".split()
    assert {path.name for path in trained.iterdir()} >= set(names)
    (about,) = json.loads((trained / "run.json").read_text())
    assert about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert re.fullmatch(r"([0-9a-f]{40}(\+changes)?)?", about["git_commit"])


def test_the_best_checkpoint_evaluates_to_the_accuracy_of_its_epoch(trained, tmp_path):
    succeed("test.py", "--checkpoint", trained / "best.pt", "--output-dir", tmp_path, cwd=ROOT / "digits")
    state, result = checkpoint.read(trained / "best.pt"), result_in(tmp_path)
    assert result["top1"] == state["best"]["test_top1"]
    assert result["count"] == 360
    assert (tmp_path / "best.predictions.png").exists()


def test_the_settings_come_from_the_checkpoint(tmp_path, monkeypatch, capfd):
    settings = "--attention channel token self --time-steps 2 --ssa-membrane released --input-size 12 --mlp-ratio 1"
    settings = [*QUICK, *settings.split(), "--amp", "bf16", "--eval-batch-size", "50", "--epochs", "1"]
    here(monkeypatch, capfd, "digits/train.py", *settings, "--output-dir", tmp_path)
    half = tmp_path / "half.yml"
    half.write_text((ROOT / "digits/digits.yml").read_text() + "amp: fp16\n")
    output = here(monkeypatch, capfd, "digits/test.py", "--checkpoint", tmp_path / "last.pt", "--config", half)
    assert "fp16" not in output
    (recorded,), result = rows_in(tmp_path), result_in(tmp_path)
    assert (result["loss"], result["top1"]) == (recorded["test_loss"], recorded["test_top1"])
    assert (result["attention"], result["time_steps"]) == (["channel", "token", "self"], 2)
    assert (result["input_size"], result["amp"], result["eval_batch_size"]) == (12, "bf16", 50)
    other = ["--checkpoint", tmp_path / "last.pt", "--ssa-membrane", "per_sample"]
    named(here(monkeypatch, capfd, "digits/test.py", *other), "ssa_membrane", "'per_sample'", "'released'")
    assert result_in(tmp_path)["ssa_membrane"] == "per_sample"


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    arguments = ["digits/train.py", *QUICK, *"--mlp-ratio 1 --epochs 2 --seed 7".split()]
    succeed(*arguments, "--output-dir", tmp_path / "whole")
    killed = run(*arguments, "--output-dir", tmp_path / "cut", before=signal_at_step(signal.SIGKILL, 7))
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint.read(tmp_path / "cut/last.pt")["epoch"] == 1
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:  # as if killed between record and checkpoint, and later
        file.write(json.dumps({"epoch": 1, "test_top1": 100}) + '\n{"epoch": ')
    succeed("digits/train.py", "--output-dir", tmp_path / "cut", "--resume", "auto")  # settings as recorded
    assert [start["first_epoch"] for start in json.loads((tmp_path / "cut/run.json").read_text())] == [0, 1]
    whole, cut = (checkpoint.read(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert same(whole["state_dict"], cut["state_dict"])
    assert whole["best"] == cut["best"]
    assert rows_in(tmp_path / "whole", "seconds") == rows_in(tmp_path / "cut", "seconds")


def test_two_ranks(tmp_path):
    commands = [(2, ["digits/train.py", *QUICK, *"--mlp-ratio 1 --epochs 1 --output-dir".split(), tmp_path / "run"])]
    test = ["digits/test.py", "--checkpoint", tmp_path / "run/last.pt", "--output-dir"]
    commands += [(count, [*test, tmp_path / str(count)]) for count in (1, 2)]
    for count, words in commands:
        children = ranks(count, *words, log=tmp_path / "log")
        assert [child.wait() for child in children] == [0] * count, children[0].output
    (recorded,) = rows_in(tmp_path / "run")  # by the main rank only
    results = [result_in(tmp_path / str(count)) for count in (1, 2)]
    for key in ("loss", "top1", "top5"):
        assert results[0][key] == results[1][key]
        assert results[0][key] == pytest.approx(
            recorded[f"test_{key}"], rel=1e-6
        )  # the checkpoint has the recorded figures
    assert results[0]["count"] == results[1]["count"] == 360


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["train.py", "--model", "qkformer_3_65"], "qkformer_3_65"),
        (["train.py", "--num-classes", "11"], "11"),
        (["train.py", "--batch-size", "4000"], "batch_size"),
        (["train.py", "--opt", "adamx"], "adamx"),
        (["train.py", "--opt", "fusedadam"], "fusedadam"),
        (["train.py", "--auto-augment", "foo"], "foo"),
        (["train.py", "--in-channels", "2", "--mean", "0,0", "--std", "1,1"], "in_channels"),
        (["train.py", "--resume", "auto"], "--output-dir"),
        (["train.py", "--output-dir", 300 * "x"], 100 * "x"),
        (["test.py", "--checkpoint", 300 * "x"], 100 * "x"),
        (["test.py", "--checkpoint", "no\nsuch.pt"], "such.pt"),
        (["train.py", "--resume", "no/such.pt"], "no/such.pt"),
        (["train.py", "--checkpoint", "x.pt"], "--checkpoint"),
        (["train.py", "--energy"], "--energy"),
        (["train.py", "--energy", "--eval", "--resume", "x.pt"], "--energy"),
        (["train.py", "--lif-backend", "cupy"], "cupy"),
        (["train.py", "--pack-spikes"], "--pack-spikes"),
        (["train.py", "--cuda-graphs"], "--cuda-graphs"),
        (["train.py", "--device", "cuda"], "--device"),
        (["train.py", "--output-dir", "/dev/null/run"], "/dev/null/run"),
        (["test.py"], "--checkpoint"),
        (["test.py", "--checkpoint", ROOT / "LICENSE"], "LICENSE"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, value, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "cupy_problem", backends.cupy_problem.__wrapped__)  # which caches its first answer
    assert value in fail(monkeypatch, capfd, "digits/" + arguments[0], *arguments[1:])


def test_a_mistake_in_a_process_of_its_own():
    result = run("digits/train.py", "--epochz", "3", fresh=True)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    named(result.stderr, "--epochz")


def test_the_environment_of_a_launcher_is_checked(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    named(fail(monkeypatch, capfd, "digits/train.py"), "WORLD_SIZE")


def test_a_run_can_branch_off_into_another_folder(trained, tmp_path, monkeypatch, capfd):
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    words = [*QUICK, "--epochs", "4", "--weight-decay", "0", "--resume", trained / "last.pt", "--output-dir", tmp_path]
    here(monkeypatch, capfd, "digits/train.py", *words)
    state = checkpoint.read(tmp_path / "best.pt")
    assert (state["epoch"], state["best"]["epoch"], state["config"]["weight_decay"]) == (4, 3, 0)
    (start,) = json.loads((tmp_path / "run.json").read_text())
    assert start["first_epoch"] == 3
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before


def test_nothing_is_overwritten(trained, tmp_path, monkeypatch, capfd):
    before = (trained / "last.pt").read_bytes()
    again = ["digits/train.py", "--output-dir", trained]
    named(fail(monkeypatch, capfd, *again), trained, "--resume auto")
    named(fail(monkeypatch, capfd, *again, "--resume", trained / "best.pt"), trained)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text((ROOT / "digits/digits.yml").read_text() + "  short: {epochs: 1}\n")
    again += ["--config", recipe, *"--epochs 3 --time-steps 1 --batch-size 32 --lr 1e-2".split()]
    for flag, value, key in [
        ("--time-steps", "3", "time_steps"),
        ("--opt", "sgd", "opt"),
        ("--variant", "short", "variant"),
    ]:
        named(fail(monkeypatch, capfd, *again, "--resume", "auto", flag, value), key, value)
    assert (trained / "last.pt").read_bytes() == before


# runs at the start of each process; torch is first, because it registers at fork everywhere but on Windows
WITHOUT_POSIX = """
import multiprocessing.context, os, signal, sys, torch
sys.modules["fcntl"] = None
del signal.SIGHUP, os.fork, os.register_at_fork, os.setpgrp
for method in ("fork", "forkserver"):
    del multiprocessing.context._concrete_contexts[method]
multiprocessing.set_start_method("spawn", force=True)
"""


@pytest.mark.parametrize("script", ["digits/train.py", pytest.param("digits-dvs/train.py", marks=pytest.mark.slow)])
def test_runs_train_and_resume_without_posix(script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_POSIX)
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    flags = "--batch-size 240 --time-steps 1 --warmup-epochs 0 --resume auto --output-dir".split()
    for epochs, workers in ((1, 1), (2, 0)):
        words = [script, *flags, tmp_path / "run", f"--epochs={epochs}", f"--workers={workers}"]
        result = run(*words, fresh=True, **environment)
        assert (result.returncode, result.stderr) == (0, "")
    assert checkpoint.read(tmp_path / "run/last.pt")["epoch"] == 2
    starts = json.loads((tmp_path / "run/run.json").read_text())
    assert [start["first_epoch"] for start in starts] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recipe_learns_the_digits(tmp_path, seed):
    succeed("digits/train.py", "--output-dir", tmp_path, "--seed", seed)
    rows = rows_in(tmp_path)
    assert max(row["test_top1"] for row in rows) >= 98
    assert rows[-1]["test_top1"] >= 97.5
    assert rows[-1]["train_loss"] < 0.3 < rows[0]["train_loss"]
