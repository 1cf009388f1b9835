"""Folder of frames of an event data set, made once on all cores; it gets its name when it is complete."""

import shutil
from collections.abc import Callable, Collection
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import filelock
import joblib

from ..cli import UserError
from ..log import logger, progress
from .frames import Layout, convert
from .recordings import Recording


def prepare(root: Path, layout: Layout, find: Callable[[], list[Recording]], show: bool) -> Path:
    """Return the folder with the frames of every sample of the data set in `root`; make or complete it first."""
    folder = root / layout.folder
    if folder.exists():
        return folder
    lock = filelock.FileLock(root / f"{folder.name}.lock")
    try:
        acquired = lock.acquire(blocking=False)
    except filelock.Timeout:
        logger.info(f"waiting for another process to prepare {folder}")
        acquired = lock.acquire()
    with acquired:
        if not folder.exists():
            logger.info(f"preparing {folder}")
            _make(folder, layout, find(), show)
    return folder


def _make(folder: Path, layout: Layout, recordings: list[Recording], show: bool) -> None:
    partial = folder.with_suffix(".partial")
    names = {name for recording in recordings for name in recording.samples}
    left = [r for r in recordings if not all((partial / name).exists() for name in r.samples)]
    size = len(names) * layout.time_steps * 2 * layout.side**2 / 1e9
    logger.info(f"{len(left):,} of {len(recordings):,} recordings to do; the frames take {size:.1f} GB in all")
    for place in {(partial / name).parent for name in names}:
        place.mkdir(parents=True, exist_ok=True)
    jobs = (joblib.delayed(convert)(r.name, r.open(), r.samples, layout, partial) for r in left)
    try:
        # `max_nbytes`: pass arguments through pipes, because the folder of temporary files may be small
        results = joblib.Parallel(joblib.cpu_count(), return_as="generator", max_nbytes=None)(jobs)
        results = list(progress(results, "preparing", max(20, len(left) // 20), show, total=len(left)))
    except BrokenProcessPool:
        raise UserError(f"{folder}: a process was killed, perhaps out of memory; start again to continue") from None
    if invalid := {recording.name: count for recording, (_, count) in zip(left, results, strict=True) if count}:
        some = f"{len(invalid):,} recordings, such as {next(iter(invalid))}"
        logger.warning(f"warning: {sum(invalid.values()):,} invalid events in {some}, are left out")
    if problems := [error for error, _ in results if error]:
        shutil.rmtree(partial)  # others may change too before the next start
        raise UserError(f"{len(problems)} of {len(recordings)} recordings cannot be read: {problems[0]}")
    for path in partial.rglob("*.*"):
        if path.is_file() and path.relative_to(partial).as_posix() not in names:
            path.unlink()  # half a file of a killed process
    partial.rename(folder)


def contents(folder: Path, classes: Collection[str]) -> list[str]:
    """Return the files CLASS/NAME of a folder of frames, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.npy") if path.parent.name in classes)
