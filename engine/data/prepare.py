"""Frames folder of a raw event data set: made once, on all cores; it gets its name when it is complete."""

import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import filelock
import joblib

from ..cli import UserError
from ..log import logger, progress
from .frames import convert
from .recordings import Recording


def prepare(root: Path, frames: int, side: int, find: Callable[[], list[Recording]], show: bool) -> Path:
    """Return the folder with every sample of the data set in `root` as `frames` frames; make or finish it first.

    Several processes may call it at once: one works and the others wait. `find` is called only if there is work to do.
    """
    folder = root / f"frames_{frames}"
    if folder.exists():
        return folder
    logger.info(f"preparing {folder}, or waiting for another process that does")
    with filelock.FileLock(root / f"{folder.name}.lock"):
        if not folder.exists():
            _make(folder, frames, side, find(), show)
    return folder


def _make(folder: Path, frames: int, side: int, recordings: list[Recording], show: bool) -> None:
    partial = folder.with_suffix(".partial")
    names = sorted(name for recording in recordings for name in recording.samples)
    left = [r for r in recordings if not all((partial / name).exists() for name in r.samples)]
    size = len(names) * frames * 2 * side**2 / 1e9
    logger.info(f"{len(left):,} of {len(recordings):,} recordings to do; all frames take {size:.1f} GB")
    for place in {(partial / name).parent for name in names}:
        place.mkdir(parents=True, exist_ok=True)
    jobs = (joblib.delayed(convert)(r.open(), r.samples, partial, frames, side) for r in left)
    try:
        # `max_nbytes`: arguments go through pipes, not through files in a folder that may be small
        results = joblib.Parallel(joblib.cpu_count(), return_as="generator", max_nbytes=None)(jobs)
        results = progress(results, "preparing", max(1, len(left) // 20), show, total=len(left))
        outcomes = [(r.name, *result) for r, result in zip(left, results, strict=True)]
    except BrokenProcessPool:
        raise UserError(f"{folder}: a process was killed, perhaps out of memory; start again, it goes on") from None
    if invalid := {name: count for name, _, count in outcomes if count}:
        some = f"{sum(invalid.values()):,} invalid events in {len(invalid):,} recordings, such as {next(iter(invalid))}"
        logger.warning(f"warning: {folder}: {some}; they are left out")
    if problems := [f"{name}: {problem}" for name, problem, _ in outcomes if problem]:
        first = ", ".join(problems[:5])
        raise UserError(f"{len(problems)} of {len(recordings)} recordings are unusable: {first}; replace them")
    for path in set(_files(partial)) - set(names):
        (partial / path).unlink()  # halves that a killed process left
    partial.rename(folder)


def _files(folder: Path) -> Iterator[str]:
    walk = os.walk(folder)  # asks the disk for names alone
    return (Path(place, file).relative_to(folder).as_posix() for place, _, files in walk for file in files)


def contents(folder: Path, classes: Collection[str]) -> list[str]:
    """Return the files of a frames folder, sorted; each is in a folder named like its class."""
    return sorted(file for file in _files(folder) if file.endswith(".npy") and Path(file).parent.name in classes)
