"""Runs that are killed again and again end with the weights of a run that never was.

A chain is one run: its process is killed, or asked to end, at a random moment, and started anew with `--resume auto`
until it is done. Augmentation, stochastic depth, an average of the weights and accumulated gradients make it hard.
"""

import dataclasses
import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
from harness import Child, Counts, Death, part, ranks, same

from engine import checkpoint

TRAIN = "digits/train.py --device cpu --epochs 2 --save-steps 2 --time-steps 1 --mlp-ratio 1 --log-interval 1".split()
TRAIN += "--batch-size 64 --accum-iter 2 --ema-decay 0.9 --drop-path 0.1 --reprob 0.2 --color-jitter 0.4".split()
SIZE = 1_300_000  # bytes of a checkpoint, about
STEPS_OF_SAVING = 18  # in which a run dies: those of its first three saves


@dataclasses.dataclass
class Whole:
    """A run that was never interrupted: its folder, and the seconds to its first save and to its end."""

    folder: Path
    first_save: float
    end: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Number of processes -> a run that was never interrupted."""
    made = {}

    def get(count):
        if count not in made:
            folder = tmp_path_factory.mktemp("whole") / str(count)
            Child("digits/test.py", "--epochs", "0", log=folder.with_suffix(".warm")).wait()  # the server's start
            start = time.monotonic()
            children = ranks(count, *TRAIN, "--output-dir", folder, log=folder.with_suffix(".log"))
            assert children[0].wait_for((folder / "last.pt").exists), children[0].output
            first_save = time.monotonic() - start
            assert [child.wait() for child in children] == [0] * count, children[0].output
            made[count] = Whole(folder, first_save, time.monotonic() - start)
        return made[count]

    return get


def content(folder):
    """What the newest checkpoint in a folder holds, None where there is none."""
    files = checkpoint.kept(folder / "last.pt")
    return checkpoint.read(files[0]) if files else None


def position(folder):
    state = content(folder)
    return (state["epoch"], state["position"]["steps_done"]) if state else (-1, -1)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


class Chain:
    """One run in `count` processes that dies in many ways, life by life."""

    def __init__(self, counts: Counts, folder: Path, whole: Whole, rng: random.Random, count: int, workers: int):
        self.counts, self.folder, self.whole, self.rng = counts, folder, whole, rng
        self.count, self.workers = count, workers
        self.name, self.lives, self.done, self.saved = (
            f"{folder.name}, {count} x, workers {workers}",
            0,
            False,
            (-1, -1),
        )

    def life(self, end, death=None, expected=(0,)):
        """Returns what the first process said; without a process that was killed or stopped, the run is done."""
        self.lives += 1
        self.counts.trials += 1
        words = [*TRAIN, "--workers", self.workers, "--output-dir", self.folder, "--resume", "auto"]
        children = ranks(
            self.count, *words, log=self.folder.parent / f"{self.folder.name}-{self.lives}.log", death=death
        )
        end(children)
        codes = [child.wait() for child in children]
        self.counts.kills += sum(code in (-signal.SIGKILL, -signal.SIGXFSZ) for code in codes)
        for child, code in zip(children, codes, strict=True):
            if code in (-signal.SIGKILL, -signal.SIGXFSZ):
                code, allowed = 0, {0}  # the others of its group have lost it
            else:
                allowed = {2} if min(c if c is not None else 0 for c in codes) < 0 else set(expected)
            self.counts.judge(f"{self.name}, life {self.lives}", code, child.output, allowed)
        self.done = set(codes) == {0}
        self._look_after()
        return children[0].output

    def _look_after(self):
        before, self.saved = self.saved, position(self.folder)
        self.counts.require(self.saved >= before, f"{self.name}: {before} was saved, and now {self.saved}", "lost")

    def finish(self):
        """Go on to the end, and compare with the run that was never interrupted."""
        while not self.done and self.lives < 100 and not self.counts.notes:
            self.life(lambda children: None)
        if self.counts.notes:
            return
        ours, theirs = content(self.folder), content(self.whole.folder)
        for key in ("state_dict", "state_dict_ema", "optimizer", "best", "epoch"):
            self.counts.require(same(ours[key], theirs[key]), f"{self.name}: {key} is another than of a whole run")
        rows = metrics(self.folder), metrics(self.whole.folder)
        self.counts.require(rows[0] == rows[1], f"{self.name}: metrics {rows[0]} where a whole run has {rows[1]}")


def chains(counts, tmp_path, whole, count, workers, kills, pick):
    """Kill runs, one after the other, until there were `kills`; `pick` gives how a life ends."""
    rng, most, number = random.Random(f"{count} {workers}"), counts.kills + kills, 0
    while counts.kills < most and not counts.notes:
        number += 1
        chain = Chain(counts, tmp_path / f"chain{number}", whole, rng, count, workers)
        while counts.kills < most and not chain.done and not counts.notes:
            chain.life(*pick(rng, whole))
        chain.finish()


def at_random_time(rng, whole, only=None):
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


def in_a_save(rng, whole):
    """Before or behind each step of a save, or at any byte of the file."""
    half = rng.random() < 0.4
    death = Death(rng.randint(1, 4), size=rng.randrange(SIZE)) if half else Death(rng.randint(1, STEPS_OF_SAVING))
    return lambda children: None, death


FULL = pytest.mark.slow


@pytest.mark.parametrize(
    ("workers", "kills"), [(0, 2), pytest.param(0, 20, marks=FULL), pytest.param(1, 15, marks=FULL)]
)
def test_killed_at_random_times(workers, kills, tmp_path, whole):
    with part("kills at random times") as counts:
        chains(counts, tmp_path, whole(1), 1, workers, kills, at_random_time)


@pytest.mark.parametrize(
    ("workers", "kills"), [(0, 4), pytest.param(0, 30, marks=FULL), pytest.param(1, 10, marks=FULL)]
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
        "any": lambda rng, whole: at_random_time(rng, whole, only=rng.randrange(2)),
        "all": at_random_time,
        "save": in_a_save,
    }
    with part("kills under two ranks") as counts:
        chains(counts, tmp_path, whole(2), 2, 0, kills, ways[which])


@pytest.mark.parametrize(
    ("count", "workers", "stops"),
    [
        (1, 1, 2),
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
            chain = Chain(counts, tmp_path / f"chain{done}", whole(count), rng, count, workers)
            while not chain.done and not counts.notes and chain.lives < 3:
                number = rng.choice([signal.SIGTERM, signal.SIGINT])
                before = chain.saved
                said = chain.life(stop_with(number, rng, whole(count)), expected=(0, 128 + number))
                told = re.search(
                    rf"stopped by {number.name} (?:after step (\d+)|in the evaluation) of epoch (\d+)", said
                )
                counts.require(chain.done or told is not None, f"{chain.name}: {said[-500:]}")
                counts.require(chain.done or chain.saved > before, f"{chain.name}: nothing done was saved", "lost")
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
