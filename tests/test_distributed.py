"""Several ranks: the gradients of a single one, deaths, restarts and launchers."""

import json

import pytest
import torch
from scripts import Child, free_port, named, ranks, same, succeed

from engine import checkpoint

QUICK = ["--batch-size", "64", "--lr", "1e-2", "--time-steps", "1"]  # 11 steps an epoch in two processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return the updates of a single rank, by the number of accumulated steps."""
    folder = tmp_path_factory.mktemp("alone")
    for accumulated in (1, 2):
        succeed("tests/first_step.py", folder / f"{accumulated}.pt", "--accum-iter", accumulated)
    return {accumulated: torch.load(folder / f"{accumulated}.pt") for accumulated in (1, 2)}


@pytest.mark.parametrize(
    ("accumulated", "flags"),
    [(1, ["--channels-last", "--ema-decay", "0.5"]), (2, ["--grad-checkpointing"])],
)
def test_two_processes_make_the_updates_of_one(alone, tmp_path, accumulated, flags):
    words = ["tests/first_step.py", tmp_path / "two.pt", "--accum-iter", accumulated, *flags]
    children = ranks(2, *words, log=tmp_path / "log")
    assert [child.wait() for child in children] == [0, 0], children[0].output + children[1].output
    one, two = alone[accumulated], torch.load(tmp_path / "two.pt")
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
    assert len(two["gradients"]) == 2
    for actual, expected in zip(two["gradients"], one["gradients"], strict=True):
        largest = max(g.abs().max() for g in expected.values())
        assert sum(not gradient.any() for gradient in expected.values()) <= 1  # the network spikes
        for name, gradient in expected.items():
            scale = gradient.abs().clamp(min=1e-3 * largest)
            assert ((actual[name] - gradient).abs() / scale).max() < 1e-9, name
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_torchruns_restart_goes_on_from_the_last_checkpoint(tmp_path):
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    train = ["digits/train.py", *QUICK, "--epochs", "3", "--resume", "auto", "--output-dir"]
    succeed(*launch, "--max-restarts=1", "tests/dies.py", 0, 15, *train, tmp_path / "cut")
    succeed(*launch, *train, tmp_path / "whole")
    whole, cut = (checkpoint.read(tmp_path / name / "last.pt")["state_dict"] for name in ("whole", "cut"))
    assert same(whole, cut)
    starts = json.loads((tmp_path / "cut/run.json").read_text())
    assert [start["first_epoch"] for start in starts] == [0, 1]


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (("--lif-backend auto", "--lif-backend torch"), "lif_backend"),
        (("--seed 1", "--seed 2"), "seed"),
        (("--sync-bn", "--sync-bn"), "--sync-bn"),
    ],
)
def test_ranks_that_cannot_train_together_all_end_in_one_line(tmp_path, flags, value):
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(2):
        words = ["digits/train.py", "--device", "cpu", *flags[rank].split()]
        children.append(Child(*words, log=tmp_path / f"{rank}", RANK=str(rank), **world))
    assert [child.wait() for child in children] == [2, 2]
    for child in children:
        assert "Traceback" not in child.output
        (line,) = [line for line in child.output.splitlines() if line.startswith("error: ")]
        named(line, value)


@pytest.mark.slow
def test_two_machines_under_torchrun(tmp_path):
    """Start one launcher per node, both on this machine, as in docs/recipes.md."""
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_id=1", "--rdzv_backend=c10d"]
    rendezvous += [f"--rdzv_endpoint=localhost:{free_port()}"]
    train = ["digits/train.py", *QUICK, "--epochs", "1", "--output-dir", tmp_path]
    words = ["-m", "torch.distributed.run", *rendezvous, *train]
    machines = [Child(*words, log=tmp_path / f"{i}.log") for i in range(2)]
    assert [machine.wait() for machine in machines] == [0, 0], machines[0].output + machines[1].output
    assert checkpoint.read(tmp_path / "last.pt")["position"]["order"]["world_size"] == 2
