"""The scripts as a user runs them, in subprocesses."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from scripts import CPU, ROOT, fail, here, result_in, run, succeed

from engine import checkpoint
from models import neuron

QUICK = ["--batch-size", "128", "--lr", "1e-2"]  # 11 steps an epoch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The recipe as it stands, trained once for all tests of this file."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    return folder, succeed("digits/train.py", "--output-dir", folder)


def test_the_recipe_learns_the_digits(trained):
    folder, output = trained
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(row["test_top1"] for row in rows) >= 98
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
    (about,) = json.loads((folder / "run.json").read_text())
    assert about["versions"]["torch"] == torch.__version__.split("+")[0]
    assert re.fullmatch(r"([0-9a-f]{40}(\+changes)?)?", about["git_commit"])
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_checkpoint_evaluates_to_the_accuracy_of_its_epoch(trained, tmp_path):
    folder, _ = trained
    output = succeed("test.py", "--checkpoint", folder / "best.pt", "--output-dir", tmp_path, cwd=ROOT / "digits")
    state, result = checkpoint.read(folder / "best.pt"), result_in(tmp_path)
    assert result["top1"] == state["best"]["test_top1"]
    assert result["count"] == 360
    assert f"top-1 {result['top1']:.2f} %" in output
    assert (tmp_path / "best.predictions.png").read_bytes().startswith(b"\x89PNG")


def test_the_networks_settings_come_from_the_checkpoint(tmp_path, monkeypatch, capfd):
    settings = ["--attention", "channel", "token", "self", "--time-steps", "2", "--ssa-membrane", "released"]
    here(monkeypatch, capfd, "digits/train.py", *QUICK, "--epochs", "1", *settings, "--output-dir", tmp_path)
    here(monkeypatch, capfd, "digits/test.py", "--checkpoint", tmp_path / "last.pt", "--eval-batch-size", "128")
    result = result_in(tmp_path)
    assert (result["attention"], result["time_steps"]) == (["channel", "token", "self"], 2)
    assert result["top1"] == json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["test_top1"]
    output = here(
        monkeypatch, capfd, "digits/test.py", "--checkpoint", tmp_path / "last.pt", "--ssa-membrane", "per_sample"
    )
    assert "ssa_membrane is 'per_sample', where the checkpoint recorded 'released'" in output
    assert result_in(tmp_path)["ssa_membrane"] == "per_sample"


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    arguments = ["digits/train.py", *QUICK, "--epochs", "4", "--time-steps", "1", "--seed", "7"]
    succeed(*arguments, "--output-dir", tmp_path / "whole")
    killed = subprocess.Popen([sys.executable, *arguments, "--output-dir", tmp_path / "cut"], cwd=ROOT, env=CPU)
    while not (tmp_path / "cut/last.pt").exists():
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = checkpoint.read(tmp_path / "cut/last.pt")["epoch"]
    assert done < 4
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:  # as if killed between record and checkpoint, and later
        file.write(json.dumps({"epoch": done, "test_top1": 100}) + '\n{"epoch": ')
    output = succeed("digits/train.py", "--output-dir", tmp_path / "cut", "--resume", "auto")  # settings as recorded
    assert f"after epoch {done}" in output
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
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
        ["-m", "torch.distributed.launch", "--standalone", "--nproc_per_node=2"],
    ]
    train = "--batch-size 32 --lr 1e-2 --epochs 1 --time-steps 1 --output-dir".split()
    output = succeed(*launchers[0], "digits/train.py", *train, tmp_path / "run")
    assert "on 2 x cpu; effective batch 64" in output
    assert output.count("epoch 1/1: lr") == 1
    one = succeed("digits/test.py", "--checkpoint", tmp_path / "run/last.pt")
    two = succeed(*launchers[1], "digits/test.py", "--checkpoint", tmp_path / "run/last.pt")
    assert one == two
    assert "on 360 samples" in two
    recorded = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    tested = result_in(tmp_path / "run")
    for key in ("loss", "top1", "top5"):  # what was recorded is what was saved
        assert tested[key] == pytest.approx(recorded[f"test_{key}"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py", "--epochz", "3"], "unknown flag --epochz, did you mean '--epochs'?"),
        (["train.py", "--model", "qkformer_3_65"], "model 'qkformer_3_65' is unknown; did you mean 'qkformer_3_64'?"),
        (["train.py", "--attention", "token", "self"], "per stage (3)"),
        (["train.py", "--num-classes", "11"], "num_classes = 11: digits has 10 classes"),
        (["train.py", "--batch-size", "4000"], "use a smaller batch_size"),
        (["train.py", "--opt", "adamx"], "opt = 'adamx'"),
        (["train.py", "--opt", "adahessian"], "opt = 'adahessian': needs second derivatives"),
        (["train.py", "--opt", "fusedadam"], "opt = 'fusedadam': "),
        (["train.py", "--auto-augment", "foo"], "auto_augment = 'foo': timm has no such policy"),
        (["train.py", "--in-channels", "3", "--mean", "0,0,0", "--std", "1,1,1"], "in_channels = 3: digits has 1"),
        (["train.py", "--resume", "auto"], "--resume auto needs --output-dir"),
        (["train.py", "--resume", 300 * "x"], "File name too long"),
        (["train.py", "--output-dir", 300 * "x"], "File name too long"),
        (["test.py", "--checkpoint", 300 * "x"], "File name too long"),
        (["test.py", "--checkpoint", "no\nsuch.pt"], "checkpoint no such.pt does not exist"),
        (["train.py", "--resume", "no/such.pt"], "checkpoint no/such.pt does not exist"),
        (["train.py", "--checkpoint", "x.pt"], "--checkpoint is for test.py"),
        (
            ["train.py", "--lif-backend", "cupy"],
            "lif_backend='cupy' needs a CUDA device (torch sees none) and cupy-cuda13x==14.2.0",
        ),
        (["train.py", "--pack-spikes"], "--pack-spikes needs the Triton kernels, and they a GPU: leave it out"),
        (["train.py", "--cuda-graphs"], "--cuda-graphs needs one process on a GPU and this is 1 x cpu: leave it out"),
        (["train.py", "--device", "cuda"], "torch sees no CUDA device here; use --device cpu"),
        (["train.py", "--output-dir", "/dev/null/run"], "/dev/null/run: Not a directory"),
        (["test.py"], "test.py needs --checkpoint FILE"),
        (["test.py", "--checkpoint", ROOT / "LICENSE"], "LICENSE: refused, it is damaged"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, message, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(neuron, "cupy_problem", neuron.cupy_problem.__wrapped__)  # which keeps its first answer
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


def test_the_environment_of_a_launcher_is_checked(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "cannot join the other processes" in fail(monkeypatch, capfd, "digits/train.py")
    monkeypatch.setenv("LOCAL_RANK", "x")
    monkeypatch.delenv("WORLD_SIZE")
    assert "LOCAL_RANK and WORLD_SIZE" in fail(monkeypatch, capfd, "digits/train.py")


def test_evaluation_under_the_conditions_of_the_run(tmp_path, monkeypatch, capfd):
    settings = ["--input-size", "12", "--mean", "0.1", "--amp", "bf16", "--ssa-membrane", "released"]
    quick = ["--batch-size", "96", "--eval-batch-size", "50", "--lr", "1e-2", "--epochs", "1", "--time-steps", "2"]
    here(monkeypatch, capfd, "digits/train.py", *quick, *settings, "--output-dir", tmp_path)
    here(monkeypatch, capfd, "digits/test.py", "--checkpoint", tmp_path / "last.pt")
    recorded, tested = json.loads((tmp_path / "metrics.jsonl").read_text()), result_in(tmp_path)
    assert (tested["loss"], tested["top1"]) == (recorded["test_loss"], recorded["test_top1"])
    assert (tested["input_size"], tested["amp"], tested["eval_batch_size"]) == (12, "bf16", 50)


def test_a_run_can_branch_off_into_another_folder(trained, tmp_path, monkeypatch, capfd):
    """Its settings are the recipe's and the flags', its best is its own, and the first run stays as it was."""
    folder, _ = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    longer = ["--epochs", "9", "--weight-decay", "0", "--batch-size", "128"]
    here(
        monkeypatch,
        capfd,
        "digits/train.py",
        "--resume",
        folder / "last.pt",
        "--output-dir",
        tmp_path / "branch",
        *longer,
    )
    state = checkpoint.read(tmp_path / "branch/best.pt")
    assert (state["epoch"], state["best"]["epoch"], state["config"]["weight_decay"]) == (9, 8, 0)
    (start,) = json.loads((tmp_path / "branch/run.json").read_text())
    assert start["first_epoch"] == 8
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_nothing_is_overwritten(trained, monkeypatch, capfd):
    folder, _ = trained
    before = (folder / "last.pt").read_bytes()
    again = ["digits/train.py", "--output-dir", folder]
    assert "holds a run already: go on with --resume auto" in fail(monkeypatch, capfd, *again)
    line = fail(monkeypatch, capfd, *again, "--resume", folder / "best.pt")
    assert "holds a run already" in line
    for flag, value, message in [
        ("--time-steps", "2", "time_steps is 4 there and 2 here"),
        ("--opt", "sgd", "opt is 'adamw' there and 'sgd' here"),
    ]:
        assert message in fail(monkeypatch, capfd, *again, "--resume", "auto", flag, value)
    assert (folder / "last.pt").read_bytes() == before


def test_a_released_checkpoint_evaluates(trained, tmp_path, monkeypatch, capfd):
    """A file under released names, in the format of timm's saver, gives the same accuracy."""
    from models import create_model
    from models.released import to_released

    folder, _ = trained
    model = create_model("qkformer_3_64")
    model.load_state_dict(checkpoint.read(folder / "best.pt")["state_dict"])
    torch.save({"arch": "QKFormer", "epoch": 5, "state_dict": to_released(model)}, tmp_path / "released.pth.tar")
    here(monkeypatch, capfd, "digits/test.py", "--checkpoint", tmp_path / "released.pth.tar")
    result = result_in(tmp_path)
    assert result["top1"] == checkpoint.read(folder / "best.pt")["best"]["test_top1"]
    torch.save({"state_dict": {"head.weight": torch.zeros(10, 64)}}, tmp_path / "poor.pth.tar")
    line = fail(monkeypatch, capfd, "digits/test.py", "--checkpoint", tmp_path / "poor.pth.tar")
    assert "does not fit the model: " in line


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_recipe_learns_the_digits_from_other_seeds(tmp_path, seed):
    succeed("digits/train.py", "--output-dir", tmp_path, "--seed", seed)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["test_top1"] >= 97.5
