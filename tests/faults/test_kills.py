"""Runs that are killed again and again end with the weights of a run that never was.

A process of theirs dies, or is asked to end, at a random instruction, after a random step, or in a save.
"""

import random
import signal
from functools import partial

import pytest
from chains import EPOCHS, Chain, position_after, updates, updates_at
from harness import Death, die_after, part
from scripts import signal_at_step

SIZE = 1_300_000  # bytes of a checkpoint, about
STEPS_OF_SAVING = 18  # in which a run dies: those of its first three saves


def chains(counts, tmp_path, whole, count, workers, kills, pick):
    """Kill runs, one after the other, until there were `kills`; `pick` gives how a life ends."""
    rng, most, number = random.Random(f"{count} {workers}"), counts.kills + kills, 0
    while counts.kills < most and not counts.notes:
        number += 1
        chain = Chain(counts, tmp_path / f"chain{number}", whole, count, workers)
        while counts.kills < most and not chain.done and not counts.notes:
            chain.life(**pick(rng, chain))
        chain.finish()


def at_any_instruction(rng, chain):
    return {"before": partial(die_after, rng.uniform(0.2, 4))}


def after_a_step(rng, chain, only=None):
    return {"before": signal_at_step(signal.SIGKILL, rng.randint(1, updates(chain.count))), "only": only}


def in_a_save(rng, chain):
    """In turns at any byte of the file, and before any step of a save."""
    if chain.lives % 2:
        return {"before": Death(rng.randint(1, STEPS_OF_SAVING)), "only": 0}
    return {"before": Death(rng.randint(1, 4), size=rng.randrange(SIZE)), "only": 0}


FULL = pytest.mark.slow


@pytest.mark.parametrize(
    ("workers", "kills"), [(1, 1), pytest.param(0, 10, marks=FULL), pytest.param(1, 8, marks=FULL)]
)
def test_killed_at_any_instruction(workers, kills, tmp_path, whole):
    with part("kills at any instruction") as counts:
        chains(counts, tmp_path, whole(1), 1, workers, kills, at_any_instruction)


@pytest.mark.parametrize(
    ("workers", "kills"), [(0, 2), pytest.param(0, 15, marks=FULL), pytest.param(1, 5, marks=FULL)]
)
def test_killed_in_a_save(workers, kills, tmp_path, whole):
    with part("kills in a save") as counts:
        chains(counts, tmp_path, whole(1), 1, workers, kills, in_a_save)


@pytest.mark.parametrize(
    ("which", "kills"),
    [pytest.param("any", 5, marks=FULL), pytest.param("all", 5, marks=FULL), pytest.param("save", 3, marks=FULL)],
)
def test_killed_under_two_ranks(which, kills, tmp_path, whole):
    """One of them, after which the other ends by itself, or both, or the first in a save."""
    ways = {
        "any": lambda rng, chain: after_a_step(rng, chain, only=rng.randrange(2)),
        "all": after_a_step,
        "save": in_a_save,
    }
    with part("kills under two ranks") as counts:
        chains(counts, tmp_path, whole(2), 2, 0, kills, ways[which])


@pytest.mark.parametrize(
    ("count", "workers", "stops"),
    [
        (1, 1, 1),
        pytest.param(1, 0, 5, marks=FULL),
        pytest.param(1, 1, 5, marks=FULL),
        pytest.param(2, 0, 3, marks=FULL),
    ],
)
def test_stopped_by_a_signal(count, workers, stops, tmp_path, whole):
    """SIGTERM and SIGINT in training or evaluation: the run is saved at the step where it is."""
    rng = random.Random(count)
    with part("SIGTERM and SIGINT") as counts:
        for number in range(stops):
            chain = Chain(counts, tmp_path / f"chain{number}", whole(count), count, workers)
            for _ in range(2):
                done = updates_at(chain.saved, count)
                step = rng.randint(1, EPOCHS * updates(count) - done)
                sent = rng.choice([signal.SIGTERM, signal.SIGINT])
                chain.life(signal_at_step(sent, step), expected=(128 + sent,))
                expected = position_after(done + step, count)
                counts.require(chain.saved == expected, f"{chain.name}: saved {chain.saved}, not {expected}", "lost")
                if expected == position_after(EPOCHS * updates(count), count):
                    break
            chain.finish()
