"""The scripts as a user runs them, in subprocesses."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine import checkpoint

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--batch-size", "128", "--lr", "1e-2"]  # 11 steps an epoch


def run(*command, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def succeed(*command, **kwargs):
    result = run(*command, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The recipe as it stands, trained once for all tests of this file."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    return folder, succeed("digits/train.py", "--output-dir", folder)


def test_the_recipe_learns_the_digits(trained):
    folder, output = trained
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["test_top1"] >= 97.5
    assert rows[-1]["train_loss"] < 0.3 < rows[0]["train_loss"]
    assert f"checkpoints, metrics and curves are in {folder}" in output
    assert "epoch 1/" in output
    assert ": step 30/89, loss " in output  # plain lines where there is no terminal


def test_a_run_leaves_its_records(trained):
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} >= {
        "config.yml",
        "run.json",
        "metrics.jsonl",
        "last.pt",
        "best.pt",
        "learning_curve.png",
        "tensorboard",
    }
    assert list((folder / "tensorboard").glob("events.*"))
    about = json.loads((folder / "run.json").read_text())
    assert about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert re.fullmatch(r"([0-9a-f]{40}(\+changes)?)?", about["git_commit"])
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_checkpoint_evaluates_to_the_accuracy_of_its_epoch(trained, tmp_path):
    folder, _ = trained
    output = succeed("test.py", "--checkpoint", folder / "best.pt", "--output-dir", tmp_path, cwd=ROOT / "digits")
    state, result = checkpoint.read(folder / "best.pt"), json.loads((tmp_path / "test.json").read_text())
    assert result["top1"] == state["best"]["test_top1"]
    assert result["count"] == 360
    assert f"top-1 {result['top1']:.2f} %" in output
    assert (tmp_path / "predictions.png").read_bytes().startswith(b"\x89PNG")


def test_the_networks_settings_come_from_the_checkpoint(tmp_path):
    settings = ["--attention", "channel", "token", "self", "--time-steps", "2", "--ssa-membrane", "released"]
    succeed("digits/train.py", *QUICK, "--epochs", "1", *settings, "--output-dir", tmp_path)
    succeed("digits/test.py", "--checkpoint", tmp_path / "last.pt", "--eval-batch-size", "128")
    result = json.loads((tmp_path / "test.json").read_text())
    assert (result["attention"], result["time_steps"]) == (["channel", "token", "self"], 2)
    assert result["top1"] == json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["test_top1"]
    succeed("digits/test.py", "--checkpoint", tmp_path / "last.pt", "--ssa-membrane", "per_sample")
    assert json.loads((tmp_path / "test.json").read_text())["ssa_membrane"] == "per_sample"


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    arguments = ["digits/train.py", *QUICK, "--epochs", "4", "--time-steps", "1", "--threads", "1"]
    succeed(*arguments, "--output-dir", tmp_path / "whole")
    killed = subprocess.Popen([sys.executable, *arguments, "--output-dir", tmp_path / "cut"], cwd=ROOT)
    metrics = tmp_path / "cut/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert checkpoint.read(tmp_path / "cut/last.pt")["epoch"] < 4
    output = succeed(*arguments, "--output-dir", tmp_path / "cut", "--resume", "auto")
    assert "resumed" in output
    whole, cut = (checkpoint.read(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert all(torch.equal(whole["state_dict"][key], cut["state_dict"][key]) for key in whole["state_dict"])
    assert whole["best"] == cut["best"]
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("whole", "cut")]
    for row in rows[0] + rows[1]:
        del row["seconds"]
    assert rows[0] == rows[1]


def test_two_ranks(tmp_path):
    """Under torchrun and the older launcher; the evaluation counts every sample once, whoever evaluates."""
    launchers = [
        ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611"],
        ["-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port=29612"],
    ]
    train = [
        "--batch-size",
        "64",
        "--lr",
        "1e-2",
        "--epochs",
        "1",
        "--time-steps",
        "1",
        "--output-dir",
        tmp_path / "run",
    ]
    output = succeed(*launchers[0], "digits/train.py", *train)
    assert "on 2 x cpu; effective batch 128" in output
    assert output.count("epoch 1/1: lr") == 1
    one = succeed("digits/test.py", "--checkpoint", tmp_path / "run/last.pt")
    two = succeed(*launchers[1], "digits/test.py", "--checkpoint", tmp_path / "run/last.pt")
    assert one == two
    assert "on 360 samples" in two


def fail(monkeypatch, capfd, script, *arguments):
    """Run a script in this process, which saves its start, and return its one line."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 2
    line = capfd.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py", "--epochz", "3"], "unknown flag --epochz, did you mean '--epochs'?"),
        (["train.py", "--model", "qkformer_3_65"], "model 'qkformer_3_65' is unknown; did you mean 'qkformer_3_64'?"),
        (["train.py", "--attention", "token", "self"], "per stage (3)"),
        (["train.py", "--num-classes", "11"], "num_classes = 11: digits has 10 classes"),
        (["train.py", "--batch-size", "4000"], "use a smaller batch_size"),
        (["train.py", "--opt", "adamx"], "opt = 'adamx'"),
        (["train.py", "--resume", "no/such.pt"], "checkpoint no/such.pt does not exist"),
        (["train.py", "--checkpoint", "x.pt"], "--checkpoint is for test.py"),
        (
            ["train.py", "--lif-backend", "cupy"],
            "lif_backend='cupy' needs a CUDA device (torch sees none) and cupy-cuda13x==14.2.0",
        ),
        (["train.py", "--device", "cuda"], "torch sees no CUDA device here; use --device cpu"),
        (["train.py", "--output-dir", "/dev/null/run"], "--output-dir /dev/null/run: Not a directory"),
        (["test.py"], "test.py needs --checkpoint FILE"),
        (["test.py", "--checkpoint", ROOT / "LICENSE"], "LICENSE: refused, it is damaged"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, message, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in fail(monkeypatch, capfd, "digits/" + arguments[0], *arguments[1:])


def test_a_mistake_in_a_process_of_its_own():
    result = run("digits/train.py", "--epochz", "3")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown flag --epochz, did you mean '--epochs'?\n"


def test_a_recipe_with_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capfd):
    for text, message in [
        ("lr: 1\nepochz: 3", "recipe.yml: unknown key 'epochz', did you mean 'epochs'?"),
        ("lr: 1\nepochs: many", "recipe.yml: epochs: 'many' is not a whole number"),
        ("lr: 1\nhflip: 2", "hflip = 2.0: must be at most 1"),
    ]:
        (tmp_path / "recipe.yml").write_text(text)
        assert message in fail(monkeypatch, capfd, "digits/train.py", "--config", tmp_path / "recipe.yml")


def test_nothing_is_overwritten(trained, monkeypatch, capfd):
    folder, _ = trained
    before = (folder / "last.pt").read_bytes()
    again = ["digits/train.py", "--output-dir", folder]
    assert "holds a run already: go on with --resume auto" in fail(monkeypatch, capfd, *again)
    line = fail(monkeypatch, capfd, *again, "--resume", "auto", "--time-steps", "2")
    assert "time_steps is 4 there and 2 here" in line
    assert (folder / "last.pt").read_bytes() == before


def test_a_released_checkpoint_evaluates(trained, tmp_path, monkeypatch, capfd):
    """A file under released names, in the format of timm's saver, gives the same accuracy."""
    from models import create_model
    from models.released import to_released

    folder, _ = trained
    model = create_model("qkformer_3_64")
    model.load_state_dict(checkpoint.read(folder / "best.pt")["state_dict"])
    torch.save({"arch": "QKFormer", "epoch": 5, "state_dict": to_released(model)}, tmp_path / "released.pth.tar")
    succeed("digits/test.py", "--checkpoint", tmp_path / "released.pth.tar")
    result = json.loads((tmp_path / "test.json").read_text())
    assert result["top1"] == checkpoint.read(folder / "best.pt")["best"]["test_top1"]
    torch.save({"state_dict": {"head.weight": torch.zeros(10, 64)}}, tmp_path / "poor.pth.tar")
    line = fail(monkeypatch, capfd, "digits/test.py", "--checkpoint", tmp_path / "poor.pth.tar")
    assert "does not fit the model: " in line


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_recipe_learns_the_digits_from_other_seeds(tmp_path, seed):
    succeed("digits/train.py", "--output-dir", tmp_path, "--seed", seed)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["test_top1"] >= 97.5
