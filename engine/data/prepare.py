"""The frames folder of a raw event data set: made once, on all cores, and complete or not there under its name."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import filelock
import joblib

from ..cli import UserError
from ..log import logger, progress
from .aedat import SIDE
from .frames import convert
from .recordings import Recording

INDEX = "index.json"  # in a frames folder: the names of its files
LARGEST_INDEX = 2**24  # bytes


def prepare(root: Path, frames: int, find: Callable[[], list[Recording]], show: bool) -> Path:
    """The folder with every sample of the data set in `root` as `frames` frames; made, or finished, where it is not.

    Several processes may call it at once: one works and the others wait.

    Args:
        find: lists the recordings; called only where there is something to do.
        show: whether to report progress.

    Raises:
        UserError: recordings are missing or damaged (all are named), or the disk is too small.
    """
    folder = root / f"frames_{frames}"
    if folder.exists():
        return folder
    lock = filelock.FileLock(root / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info(f"another process prepares {folder}: waiting for it")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}); let --data-path be a folder of your own, with links to the "
            "recordings"
        ) from None
    try:
        if not folder.exists():
            _make(folder, frames, find(), show)
    finally:
        lock.release()
    return folder


def _make(folder: Path, frames: int, recordings: list[Recording], show: bool) -> None:
    partial = folder.with_suffix(".partial")
    names = sorted(name for recording in recordings for name in recording.samples)
    left = [r for r in recordings if not all((partial / name).exists() for name in r.samples)]
    size = sum(len(r.samples) for r in left) * frames * 2 * SIDE**2
    if shutil.disk_usage(folder.parent).free < size:
        raise UserError(f"{folder} needs {size / 1e6:,.0f} MB more on its disk; make room, or move the data set")
    cores = joblib.cpu_count()
    logger.info(
        f"preparing {folder}, once: {len(names):,} samples of {frames} frames from {len(recordings):,} recordings, "
        f"{len(left):,} of them still to do; {size / 1e9:.1f} GB at a byte a pixel, on {cores} cores"
    )
    for place in {(partial / name).parent for name in names}:
        place.mkdir(parents=True, exist_ok=True)
    jobs = (joblib.delayed(convert)(r.open(), r.decode, r.samples, partial, frames) for r in left)
    try:
        # `max_nbytes`: what is passed is passed by pipe, not by files in a folder that may be small
        results = joblib.Parallel(cores, return_as="generator", max_nbytes=None)(jobs)
        results = progress(results, "preparing", max(1, len(left) // 20), show, total=len(left))
        problems = [f"{r.name}: {what}" for r, what in zip(left, results, strict=True) if what]
    except BrokenProcessPool:
        raise UserError(
            f"a process that prepares {folder} was killed, for want of memory? Start again: it goes on"
        ) from None
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{len(problems)} of {len(recordings)} recordings cannot be used: {'; '.join(problems[:5])}{more}. Fetch "
            "them again; nothing was deleted, and the others are done"
        )
    for path in set(_files(partial)) - set(names):
        (partial / path).unlink()  # halves that a killed process left
    (partial / INDEX).write_text(json.dumps(names))
    partial.rename(folder)


def _files(folder: Path) -> Iterator[str]:
    walk = os.walk(folder)  # asks the disk for nothing but names
    return (Path(place, file).relative_to(folder).as_posix() for place, _, files in walk for file in files)


def contents(folder: Path, classes: Collection[str]) -> list[str]:
    """The files of a frames folder, sorted; each is in a folder named like its class.

    Raises:
        UserError: one is missing, or it is no frames folder.
    """
    remedy = f"delete {folder}, and it is made anew from the recordings"
    try:
        with (folder / INDEX).open() as file:
            names = json.loads(file.read(LARGEST_INDEX))
        is_valid = len(set(names)) == len(names) > 0
        is_valid &= all(name.endswith(".npy") and Path(name).parent.name in classes for name in names)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{folder / INDEX} is missing or damaged; {remedy}")
    if absent := set(names) - set(_files(folder)):
        raise UserError(f"{folder} lacks {len(absent)} of its {len(names)} files, such as {min(absent)}; {remedy}")
    return names
