"""Processes that a run loses, and runs that want the same folder."""

import multiprocessing
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from chains import TRAIN, Chain, content, metrics, updates
from harness import part, same
from scripts import AtStep, Child


def kill_a_worker():
    for worker in multiprocessing.active_children()[:1]:
        os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_loaders_process_is_killed(kills, tmp_path, whole):
    """The run ends in one line, and goes on to the same weights."""
    rng = random.Random(0)
    with part("killed loader processes") as counts:
        while counts.kills < kills and not counts.notes:
            chain = Chain(counts, tmp_path / f"chain{counts.kills}", whole(1), workers=1)
            while counts.kills < kills and not chain.done and not counts.notes:
                chain.life(AtStep(kill_a_worker, rng.randint(1, 2 * updates(1) - 2)), expected=(0, 2))
                counts.kills += not chain.done
            chain.finish()


def wait_for_the_others(folder):
    """Note that this run was let in, and wait for the end of those that were not."""
    (folder / f"{os.getpid()}.in").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)


@pytest.mark.parametrize(("runs", "rounds"), [(2, 1), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_several_runs_in_one_folder(runs, rounds, tmp_path, whole):
    """One of those that start at once is let in, and its weights are those of a run alone."""
    with part("runs in one folder") as counts:
        for number in range(rounds):
            folder, gate = tmp_path / f"round{number}", tmp_path / f"gate{number}"
            gate.mkdir()
            words = [*TRAIN, "--output-dir", folder, "--resume", "auto"]
            before = AtStep(partial(wait_for_the_others, gate), 1)
            children = [Child(*words, log=Path(f"{folder}-{i}.log"), before=before) for i in range(runs)]
            while sum(child.process.is_alive() for child in children) > len(list(gate.glob("*.in"))):
                time.sleep(0.01)
            (gate / "go").touch()
            codes = [child.wait() for child in children]
            for child, code in zip(children, codes, strict=True):
                counts.trials += 1
                counts.judge(folder.name, code, child.output, {0, 2})
                counts.require(code == 0 or str(folder) in child.output, f"{folder.name}: {child.output[-500:]}")
            counts.require(codes.count(0) == 1, f"{folder.name}: exit codes {codes}")
            is_same = same(content(folder)["state_dict"], content(whole(1))["state_dict"])
            counts.require(is_same and metrics(folder) == metrics(whole(1)), f"{folder.name}: other results")
