"""Raw event recordings that become frames on the disk in a second: ours and the plain spikingjelly call, in turns.

    python -m benchmarks.events [--help]

The recordings are synthetic, in the true formats and of realistic size. Both sides start from the extracted folder of
raw .aedat files. The script ends without a result if their frames differ. For spikingjelly's call the md5 check of the
archives is off, because there are none, and numpy.fromstring, which lost its binary mode, is numpy.frombuffer.
"""

import contextlib
import functools
import logging
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from timeit import timeit
from typing import NamedTuple
from unittest import mock

import numpy as np
from joblib.externals.loky import get_reusable_executor
from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS
from spikingjelly.datasets.dvs128_gesture import DVS128Gesture
from tabulate import tabulate

from analysis.common import main, parser, positive
from engine.cli import UserError
from engine.data import recordings
from engine.data.prepare import prepare
from engine.log import logger

from .common import RESULTS, machine, result_path, spread, write
from .synthetic import write_cifar10_dvs, write_dvs128_gesture

FRAMES = 16
SETTINGS = {"data_type": "frame", "frames_number": FRAMES, "split_by": "number"}
RAW = ("extract", "download")  # folders of a data set that hold no frames


class Case(NamedTuple):
    """A data set: its raw files, and the calls of both sides that make frames of them."""

    recordings: int
    events: int  # of a sample: a recording of CIFAR10-DVS, or a gesture
    write: Callable[[Path, int, int], None]
    spikingjelly: Callable[..., object]
    find: Callable[[Path, bool], list[recordings.Recording]]


def cases(count: int | None, size: int | None) -> dict[str, Case]:
    """Return both data sets, with `count` recordings (of each class of CIFAR10-DVS) of `size` events."""
    gestures = functools.partial(DVS128Gesture, train=True)  # makes the frames of the test set, too
    return {
        "CIFAR10-DVS": Case((count or 3) * 10, size or 200_000, write_cifar10_dvs, CIFAR10DVS, recordings.cifar10_dvs),
        "DVS128 Gesture": Case(count or 2, size or 350_000, write_dvs128_gesture, gestures, recordings.dvs128_gesture),
    }


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Let spikingjelly's call run without archives and with a new numpy, and without a line per file."""
    with (
        mock.patch("torchvision.datasets.utils.check_integrity", return_value=True),
        mock.patch("numpy.fromstring", np.frombuffer),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield


def clean(root: Path) -> None:
    """Delete all but the raw data, and wait until the disk has written everything."""
    for path in root.iterdir():
        if path.name not in RAW:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()


def require_equal(theirs: Path, ours: Path) -> int:
    """Return the number of samples; raises `UserError` where one is missing or its frames differ."""
    theirs, ours = theirs / f"frames_number_{FRAMES}_split_by_number", ours / f"frames_{FRAMES}"
    names = {path.relative_to(theirs).with_suffix("") for path in theirs.rglob("*.npz")}
    if odd := names ^ {path.relative_to(ours).with_suffix("") for path in ours.rglob("*.npy")}:
        raise UserError(f"{min(odd)}: only one side has this sample; fix it first")
    for name in sorted(names):
        if not np.array_equal(np.load(theirs / f"{name}.npz")["frames"], np.load(ours / f"{name}.npy")):
            raise UserError(f"{name}: the frames of both sides differ; fix them first")
    return len(names)


def measure(case: Case, root: Path, repeats: int) -> Iterator[dict]:
    """Time both sides in turns, with the start of our worker processes; yield the figures so far after each turn."""
    theirs, ours = root / "theirs", root / "ours"
    case.write(theirs, case.recordings, case.events)
    shutil.copytree(theirs, ours)
    (theirs / "download").mkdir()  # without it spikingjelly downloads the data set
    make = functools.partial(prepare, ours, FRAMES, functools.partial(case.find, ours, False), show=False)
    seconds = {"spikingjelly": [], "ours": []}
    for _ in range(repeats):
        clean(theirs)
        with patched():
            seconds["spikingjelly"].append(timeit(lambda: case.spikingjelly(theirs, **SETTINGS), number=1))
        clean(ours)
        get_reusable_executor().shutdown(wait=True)
        seconds["ours"].append(timeit(make, number=1))
        samples = require_equal(theirs, ours)
        yield {
            "recordings": case.recordings,
            "events_per_sample": case.events,
            "samples": samples,
            "recordings_per_s": {side: rates(case.recordings, seconds, side) for side in seconds},
        }


def rates(count: int, seconds: dict[str, list[float]], side: str) -> dict:
    """Return the recordings a second of a side, and the ratio of its median to spikingjelly's."""
    ratio = statistics.median(seconds["spikingjelly"]) / statistics.median(seconds[side])
    return spread(count / s for s in seconds[side]) | {"ratio": ratio, "seconds": seconds[side]}


def run(argv: Sequence[str]) -> None:
    flags = parser(__doc__)
    flags.add_argument("--repeats", type=positive, default=3, help="turns of each side (3)")
    flags.add_argument("--recordings", type=positive, help="of each class of CIFAR10-DVS (3), of DVS128 Gesture (2)")
    flags.add_argument("--events", type=positive, help="of a recording of CIFAR10-DVS (200,000), a gesture (350,000)")
    flags.add_argument("--output", type=Path, default=RESULTS, help=f"folder to write to ({RESULTS})")
    args = flags.parse_args(argv)
    logger.setLevel(logging.ERROR)  # it warns of data sets smaller than the published ones
    report = machine("events") | {"frames": FRAMES, "repeats": args.repeats, "data_sets": {}}
    path = result_path(args.output, "events", report["device"])
    for name, case in cases(args.recordings, args.events).items():
        with tempfile.TemporaryDirectory() as folder:
            for result in measure(case, Path(folder), args.repeats):
                report["data_sets"][name] = result
                write(path, report)
        columns = ("min", "median", "max", "ratio")
        rows = [[side, *map(figures.get, columns)] for side, figures in result["recordings_per_s"].items()]
        print(f"{name}, recordings/s: {result['recordings']} recordings, {result['samples']} samples of {case.events}")
        print(tabulate(rows, ["side", *columns], floatfmt=".2f"), end="\n\n", flush=True)
    print(path)


if __name__ == "__main__":
    main(run)
