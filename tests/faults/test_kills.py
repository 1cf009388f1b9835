"""Runs that are killed again and again end with the weights of a run that never was.

A process of theirs dies, or is asked to end, at a random moment or at one of the steps of saving a checkpoint.
"""

import random
import re
import signal
import time

import pytest
from chains import Chain
from harness import Death, part

SIZE = 1_300_000  # bytes of a checkpoint, about
STEPS_OF_SAVING = 18  # in which a run dies: those of its first three saves


def chains(counts, tmp_path, whole, count, workers, kills, pick):
    """Kill runs, one after the other, until there were `kills`; `pick` gives how a life ends."""
    rng, most, number = random.Random(f"{count} {workers}"), counts.kills + kills, 0
    while counts.kills < most and not counts.notes:
        number += 1
        chain = Chain(counts, tmp_path / f"chain{number}", whole, count, workers)
        while counts.kills < most and not chain.done and not counts.notes:
            chain.life(*pick(rng, whole, chain.lives))
        chain.finish()


def at_random_time(rng, whole, lives, only=None):
    """SIGKILL for all processes, or for one of them, once they have found each other."""

    def end(children):
        if only is not None:
            children[0].wait_for(lambda: "writing to" in children[0].output)
            time.sleep(rng.uniform(0, 0.4) * whole.end)
        else:
            time.sleep(rng.uniform(0.5 * whole.first_save, whole.first_save + 0.5 * (whole.end - whole.first_save)))
        for child in children if only is None else [children[only]]:
            child.signal(signal.SIGKILL)

    return end, None


def in_a_save(rng, whole, lives):
    """In turns at any byte of the file, and before any step of a save."""
    half = Death(rng.randint(1, 4), size=rng.randrange(SIZE))
    return lambda children: None, Death(rng.randint(1, STEPS_OF_SAVING)) if lives % 2 else half


FULL = pytest.mark.slow


@pytest.mark.parametrize(
    ("workers", "kills"), [(1, 1), pytest.param(0, 20, marks=FULL), pytest.param(1, 15, marks=FULL)]
)
def test_killed_at_random_times(workers, kills, tmp_path, whole):
    with part("kills at random times") as counts:
        chains(counts, tmp_path, whole(1), 1, workers, kills, at_random_time)


@pytest.mark.parametrize(
    ("workers", "kills"), [(0, 2), pytest.param(0, 30, marks=FULL), pytest.param(1, 10, marks=FULL)]
)
def test_killed_in_a_save(workers, kills, tmp_path, whole):
    with part("kills in a save") as counts:
        chains(counts, tmp_path, whole(1), 1, workers, kills, in_a_save)


@pytest.mark.parametrize(
    ("which", "kills"),
    [pytest.param("any", 10, marks=FULL), pytest.param("all", 10, marks=FULL), pytest.param("save", 6, marks=FULL)],
)
def test_killed_under_two_ranks(which, kills, tmp_path, whole):
    """One of them, after which the other ends by itself, or both, or the first in a save."""
    ways = {
        "any": lambda rng, whole, lives: at_random_time(rng, whole, lives, only=rng.randrange(2)),
        "all": at_random_time,
        "save": in_a_save,
    }
    with part("kills under two ranks") as counts:
        chains(counts, tmp_path, whole(2), 2, 0, kills, ways[which])


@pytest.mark.parametrize(
    ("count", "workers", "stops"),
    [
        (1, 1, 1),
        pytest.param(1, 0, 10, marks=FULL),
        pytest.param(1, 1, 10, marks=FULL),
        pytest.param(2, 0, 6, marks=FULL),
    ],
)
def test_stopped_by_a_signal(count, workers, stops, tmp_path, whole):
    """SIGTERM and SIGINT in training or evaluation: the run is saved where it is, to the step that it tells."""
    rng = random.Random(count)
    with part("SIGTERM and SIGINT") as counts:
        done = 0
        while done < stops and not counts.notes:
            done += 1
            chain = Chain(counts, tmp_path / f"chain{done}", whole(count), count, workers)
            while not chain.done and not counts.notes and chain.lives < 2:
                number = rng.choice([signal.SIGTERM, signal.SIGINT])
                before = chain.saved
                said = chain.life(stop_with(number, rng, whole(count)), expected=(0, 128 + number, -number))
                told = re.search(
                    rf"stopped by {number.name} (?:after step (\d+)|in the evaluation) of epoch (\d+)", said
                )
                is_over = chain.saved >= (2, 0)  # and nothing can be lost: the signal acts as it does on any program
                counts.require(is_over or told is not None, f"{chain.name}: {said[-500:]}")
                trained = told is None or told[1]  # else it was stopped in an evaluation, which is made anew
                counts.require(
                    is_over or chain.saved > before or not trained, f"{chain.name}: nothing done was saved", "lost"
                )
                if told and told[1]:
                    where = (int(told[2]) - 1, int(told[1]))
                    counts.require(chain.saved == where, f"{chain.name}: told {where}, saved {chain.saved}", "lost")
            chain.finish()


def stop_with(number, rng, whole):
    def end(children):
        children[0].wait_for(lambda: ": step " in children[0].output)
        time.sleep(rng.uniform(0, 0.5) * (whole.end - whole.first_save))
        for child in children:
            child.signal(number)

    return end
