"""Runs whose processes die and resume until the end, and checks of their results.

Augmentation, stochastic depth, an average of the weights and accumulated gradients make it hard to go on exactly.
"""

import dataclasses
import signal
from pathlib import Path

from harness import judge
from scripts import ranks, rows_in, same

from engine import checkpoint

TRAIN = "digits/train.py --device cpu --epochs 2 --save-steps 2 --time-steps 1 --mlp-ratio 1 --log-interval 1".split()
TRAIN += "--batch-size 120 --accum-iter 2 --ema-decay 0.9 --drop-path 0.1 --reprob 0.2 --color-jitter 0.4".split()
STEPS = {1: 11, 2: 5}  # number of processes -> batches of an epoch, two for each update
UPDATES = {1: 6, 2: 3}


def run_whole(folder: Path, count: int) -> Path:
    """Run in `count` ranks without a fault; return the folder."""
    children = ranks(count, *TRAIN, "--output-dir", folder, log=folder.with_suffix(".log"))
    assert [child.wait() for child in children] == [0] * count, children[0].output
    return folder


def content(folder: Path) -> dict | None:
    """Return the newest checkpoint in a folder, or None."""
    files = checkpoint.kept(folder / "last.pt")
    return checkpoint.read(files[0]) if files else None


def require_equal(folder: Path, other: Path) -> None:
    """Assert that two runs ended with the same weights, state and figures, to the last bit."""
    actual, expected = content(folder), content(other)
    for key in ("state_dict", "state_dict_ema", "optimizer", "best", "epoch"):
        assert same(actual[key], expected[key]), f"{folder}: {key}"
    assert rows_in(folder, "seconds") == rows_in(other, "seconds")


@dataclasses.dataclass
class Chain:
    """Run of `count` ranks with `workers` loader processes each, over several lives of its processes."""

    folder: Path
    whole: Path  # folder of a run without a fault
    count: int = 1
    workers: int = 0
    lives: int = 0
    done: bool = False
    saved: tuple[int, int] = (-1, -1)  # epochs, and steps of the next

    def life(self, before=None, only=None, end=lambda: None, expected=(0,)) -> None:
        """Start the processes, `end` them, and check their files.

        Processes that are not killed must end with one of the `expected` codes; with 2, or 0 if they were done, where
        another was killed.
        """
        self.lives += 1
        name = f"{self.folder.name}, life {self.lives}"
        words = [*TRAIN, "--workers", self.workers, "--output-dir", self.folder, "--resume", "auto"]
        log = self.folder.with_name(f"{self.folder.name}-{self.lives}.log")
        children = ranks(self.count, *words, log=log, before=before, only=only)
        end()
        codes = [child.wait() for child in children]
        killed = [code in (-signal.SIGKILL, -signal.SIGXFSZ, -signal.SIGPROF) for code in codes]
        for child, code, is_killed in zip(children, codes, killed, strict=True):
            judge(name, code, child.output, {code} if is_killed else {0, 2} if any(killed) else expected)
        self.done = set(codes) == {0}
        if state := content(self.folder):
            saved = state["epoch"], state["position"]["steps_done"]
            assert saved >= self.saved, f"{name}: {self.saved} was saved, now {saved}"
            self.saved = saved
        else:
            assert self.saved == (-1, -1), f"{name}: the checkpoint is gone"

    def finish(self) -> None:
        """Resume to the end, and compare with the uninterrupted run."""
        if not self.done:
            self.life()
        require_equal(self.folder, self.whole)
