"""Runs that are killed, stopped or lose a process: they end with the weights of an uninterrupted run."""

import multiprocessing
import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest
from chains import TRAIN, UPDATES, Chain, require_equal
from harness import SLOW, Death, die_after, judge
from scripts import AtStep, Child, Gate, signal_at_step

SIZE = 1_300_000  # bytes of a checkpoint, about


def kill_a_worker():
    for worker in multiprocessing.active_children()[:1]:
        os.kill(worker.pid, signal.SIGKILL)


def killed(rng, count):
    return {"before": signal_at_step(signal.SIGKILL, rng.randint(1, UPDATES[count]))}


def stopped(rng, count):
    sent = rng.choice([signal.SIGTERM, signal.SIGINT])
    return {"before": signal_at_step(sent, rng.randint(1, UPDATES[count])), "expected": (0, 128 + sent)}


FAULTS = {  # random generator, number of ranks -> end of a life
    "at any instruction": lambda rng, count: {"before": partial(die_after, rng.uniform(0.2, 2))},
    "after a step": killed,
    "one after a step": lambda rng, count: killed(rng, count) | {"only": rng.randrange(count)},
    "in a save": lambda rng, count: {
        "before": Death(rng.randint(1, 4), size=rng.choice([None, rng.randrange(SIZE)])),
        "only": 0,
    },
    "stopped": stopped,
    "without a worker": lambda rng, count: {"before": AtStep(kill_a_worker, rng.randint(1, 3)), "expected": (0, 2)},
}


@pytest.mark.parametrize(
    ("fault", "count", "workers", "times"),
    [
        ("at any instruction", 1, 1, 1),
        ("in a save", 1, 0, 1),
        ("without a worker", 1, 1, 1),
        ("one after a step", 2, 0, 1),
        pytest.param("at any instruction", 1, 1, 4, marks=SLOW),
        pytest.param("in a save", 1, 0, 8, marks=SLOW),
        pytest.param("in a save", 2, 0, 4, marks=SLOW),
        pytest.param("one after a step", 2, 0, 4, marks=SLOW),
        pytest.param("after a step", 2, 0, 4, marks=SLOW),
        pytest.param("stopped", 1, 1, 6, marks=SLOW),
        pytest.param("stopped", 2, 0, 4, marks=SLOW),
        pytest.param("without a worker", 1, 1, 4, marks=SLOW),
    ],
)
def test_a_run_resumes_after(fault, count, workers, times, tmp_path, whole):
    rng, left, number = random.Random(f"{count} {workers}"), times, 0
    while left:
        number += 1
        chain = Chain(tmp_path / f"chain{number}", whole(count), count, workers)
        while left and not chain.done:
            chain.life(**FAULTS[fault](rng, count))
            left -= not chain.done
        chain.finish()


@pytest.mark.parametrize("runs", [2, pytest.param(4, marks=SLOW)])
def test_one_of_several_runs_that_start_at_once_is_let_in(runs, tmp_path, whole):
    words = [*TRAIN, "--output-dir", tmp_path / "run", "--resume", "auto"]
    gates = [Gate() for _ in range(runs)]
    children = [
        Child(*words, log=Path(f"{tmp_path}/{i}.log"), before=AtStep(gate.wait, 1)) for i, gate in enumerate(gates)
    ]
    inside = [gate for gate in gates if gate.is_reached()]  # blocks until the others have ended
    assert len(inside) == 1
    inside[0].open()
    codes = [child.wait() for child in children]
    for child, code in zip(children, codes, strict=True):
        judge("run", code, child.output, {0, 2})
        assert code == 0 or str(tmp_path / "run") in child.output
    assert codes.count(0) == 1
    require_equal(tmp_path / "run", whole(1))
