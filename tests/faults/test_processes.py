"""Processes that a run loses, and runs that want the same folder."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from chains import TRAIN, Chain, content, metrics
from harness import Child, part, same


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def kill_a_worker(rng):
    def end(children):
        (child,) = children
        child.wait_for(lambda: ": step " in child.output)
        time.sleep(rng.uniform(0, 1))
        for _ in range(100):  # they are others in each epoch
            try:
                os.kill(rng.choice(children_of(child.process.pid)), signal.SIGKILL)
            except (OSError, IndexError):
                time.sleep(0.02)
            else:
                break

    return end


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_a_loaders_process_is_killed(kills, tmp_path, whole):
    """The run ends in one line, and goes on to the same weights."""
    rng = random.Random(0)
    with part("killed loader processes") as counts:
        while counts.kills < kills and not counts.notes:
            chain = Chain(counts, tmp_path / f"chain{counts.kills}", whole(1), workers=1)
            while counts.kills < kills and not chain.done and not counts.notes:
                chain.life(kill_a_worker(rng), expected=(0, 2))
                counts.kills += not chain.done
            chain.finish()


@pytest.mark.parametrize(("runs", "rounds"), [(2, 1), pytest.param(4, 6, marks=pytest.mark.slow)])
def test_several_runs_in_one_folder(runs, rounds, tmp_path, whole):
    """One of those that start at once is let in, and its weights are those of a run alone."""
    with part("runs in one folder") as counts:
        for number in range(rounds):
            folder = tmp_path / f"round{number}"
            words = [*TRAIN, "--output-dir", folder, "--resume", "auto"]
            children = [Child(*words, log=Path(f"{folder}-{i}.log")) for i in range(runs)]
            codes = [child.wait() for child in children]
            for child, code in zip(children, codes, strict=True):
                counts.trials += 1
                counts.judge(folder.name, code, child.output, {0, 2})
                refused = "another run is writing to" in child.output
                counts.require(code == 0 or refused, f"{folder.name}: {child.output[-500:]}")
            counts.require(codes.count(0) == 1, f"{folder.name}: exit codes {codes}")
            is_same = same(content(folder)["state_dict"], content(whole(1).folder)["state_dict"])
            counts.require(is_same and metrics(folder) == metrics(whole(1).folder), f"{folder.name}: other results")
