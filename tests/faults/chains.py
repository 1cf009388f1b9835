"""Runs whose processes die and that go on until they are done, and what must come of them.

Augmentation, stochastic depth, an average of the weights and accumulated gradients make it hard to go on exactly.
"""

import dataclasses
import json
import signal
from collections.abc import Callable, Collection
from pathlib import Path

from harness import Counts, same
from scripts import Child, ranks

from engine import checkpoint
from engine.cli import UserError

TRAIN = "digits/train.py --device cpu --epochs 2 --save-steps 2 --time-steps 1 --mlp-ratio 1 --log-interval 1".split()
TRAIN += "--batch-size 64 --accum-iter 2 --ema-decay 0.9 --drop-path 0.1 --reprob 0.2 --color-jitter 0.4".split()
EPOCHS, SAMPLES, BATCH, ACCUMULATED = 2, 1437, 64, 2


def run_whole(folder: Path, count: int) -> Path:
    """Run in `count` processes without a fault; return the folder."""
    children = ranks(count, *TRAIN, "--output-dir", folder, log=folder.with_suffix(".log"))
    assert [child.wait() for child in children] == [0] * count, children[0].output
    return folder


def updates(count: int) -> int:
    """Optimizer steps of an epoch in `count` processes."""
    return -(-(SAMPLES // (BATCH * count)) // ACCUMULATED)


def position_after(update: int, count: int) -> tuple[int, int]:
    """Epochs done, and steps of the next, after so many optimizer steps of a run; an epoch ends with its evaluation."""
    epoch, update = divmod(update - 1, updates(count))
    return epoch, min((update + 1) * ACCUMULATED, SAMPLES // (BATCH * count))


def updates_at(position: tuple[int, int], count: int) -> int:
    """Optimizer steps that a checkpoint at this position has."""
    epoch, steps = position
    return max(epoch, 0) * updates(count) + -(-max(steps, 0) // ACCUMULATED)


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


@dataclasses.dataclass
class Chain:
    """One run in `count` processes with `workers` loader processes each, from life to life of its processes."""

    counts: Counts
    folder: Path
    whole: Path  # folder of a run without a fault
    count: int = 1
    workers: int = 0
    lives: int = 0
    done: bool = False
    saved: tuple[int, int] = (-1, -1)  # epochs, and steps of the next

    @property
    def name(self) -> str:
        return f"{self.folder.name}, {self.count} processes, {self.workers} workers, life {self.lives}"

    def life(
        self,
        before: Callable[[], None] | None = None,
        only: int | None = None,
        end: Callable[[list[Child]], None] = lambda children: None,
        expected: Collection[int] = (0,),
    ) -> str:
        """Start the processes, let `end` act on them, and check what they leave; return the first one's output.

        Processes that are not killed must end with one of the `expected` codes; with 2, or 0 if they were done, where
        another was killed.
        """
        self.lives += 1
        self.counts.trials += 1
        words = [*TRAIN, "--workers", self.workers, "--output-dir", self.folder, "--resume", "auto"]
        log = self.folder.with_name(f"{self.folder.name}-{self.lives}.log")
        children = ranks(self.count, *words, log=log, before=before, only=only)
        end(children)
        codes = [child.wait() for child in children]
        killed = [code in (-signal.SIGKILL, -signal.SIGXFSZ, -signal.SIGPROF) for code in codes]
        self.counts.kills += sum(killed)
        for child, code, is_killed in zip(children, codes, killed, strict=True):
            if is_killed:
                self.counts.require("Traceback" not in child.output, f"{self.name}: {child.output}", "tracebacks")
            else:
                self.counts.judge(self.name, code, child.output, {0, 2} if any(killed) else set(expected))
        self.done = set(codes) == {0}
        earlier = self.saved
        try:
            self.saved = position(self.folder)
        except UserError as error:
            self.counts.count("lost", f"{self.name}: {error}")
        self.counts.require(self.saved >= earlier, f"{self.name}: {earlier} was saved, now {self.saved}", "lost")
        return children[0].output

    def finish(self):
        """Go on to the end, and compare with the run that was never interrupted."""
        while not self.done and self.lives < 100 and not self.counts.notes:
            self.life()
        if self.counts.notes:
            return
        ours, theirs = content(self.folder), content(self.whole)
        for key in ("state_dict", "state_dict_ema", "optimizer", "best", "epoch"):
            self.counts.require(same(ours[key], theirs[key]), f"{self.name}: {key} is another than of a whole run")
        rows = metrics(self.folder), metrics(self.whole)
        self.counts.require(rows[0] == rows[1], f"{self.name}: metrics {rows[0]} where a whole run has {rows[1]}")
