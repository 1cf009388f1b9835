"""How many raw event recordings a second become frames on disk: ours beside the plain spikingjelly call.

    python -m benchmarks.events [--help]

The recordings are synthetic, in the true formats and of realistic size. Both sides start from the extracted folder of
raw .aedat files, and both must give equal frames, or nothing is reported.
"""

import argparse
import contextlib
import functools
import logging
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from timeit import repeat, timeit
from unittest import mock

import numpy as np
from joblib.externals.loky import get_reusable_executor
from spikingjelly import datasets as spikingjelly
from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS
from spikingjelly.datasets.dvs128_gesture import DVS128Gesture

from engine.data import aedat, recordings
from engine.data.frames import integrate
from engine.data.prepare import prepare
from engine.log import logger
from tests.tiny_data import CIFAR10_CLASSES, aedat2, aedat31, dvs128_gesture, events

from .common import RESULTS, machine, result_path, write

FRAMES = 16
PACKAGES = ("torch", "numpy", "spikingjelly", "joblib")
STEPS = 15  # repetitions of the step from one file to its frames, which takes a second at most
RAW = ("extract", "download")  # what a data set's folder holds before anything is made of it
PLAIN, COLD, WARM = "spikingjelly", "ours", "ours, its workers already running"
MD5, FROMSTRING = "torchvision.datasets.utils.check_integrity", "numpy.fromstring"
PATCHES = {  # for spikingjelly's call alone: what stands in, and what to say of it
    MD5: (lambda **_: True, "returns True: there are no archives whose md5 could match"),
    FROMSTRING: (np.frombuffer, "is numpy.frombuffer: it has no binary mode in the numpy installed"),
}


@dataclass(frozen=True)
class Case:
    """A data set: how its raw files are written, and what makes frames of them on each side."""

    name: str
    recordings: int
    events: int  # of a sample: of a recording of CIFAR10-DVS, or of one gesture
    write: Callable[[Path, int, int], object]
    encode: Callable[..., bytes]
    theirs: Callable[[Path], object]
    load: Callable[[str], dict]
    find: Callable[[Path, bool], list[recordings.Recording]]
    decode: Callable[[bytes], aedat.Events]
    remedy: str | None  # the patch without which spikingjelly's call may fail


def write_cifar10_dvs(root: Path, count: int, size: int) -> None:
    """`count` recordings of `size` events in all, as the archives unpack."""
    random = np.random.default_rng(0)
    for label, name in enumerate(CIFAR10_CLASSES):
        folder = root / "extract" / name
        folder.mkdir(parents=True)
        for i in range(count // len(CIFAR10_CLASSES)):
            content = aedat2(*events(label, len(CIFAR10_CLASSES), size, random))
            (folder / f"cifar10_{name}_{i}.aedat").write_bytes(content)


def cases(count: int | None, size: int | None) -> list[Case]:
    """Both data sets, with `count` recordings (of each class of CIFAR10-DVS) and `size` events where they are given."""
    plain = {"data_type": "frame", "frames_number": FRAMES, "split_by": "number"}
    return [
        Case("CIFAR10-DVS", (count or 3) * len(CIFAR10_CLASSES), size or 200_000, write_cifar10_dvs, aedat2,
             functools.partial(CIFAR10DVS, **plain), CIFAR10DVS.load_origin_data, recordings.cifar10_dvs,
             aedat.read_aedat2, FROMSTRING),
        Case("DVS128 Gesture", count or 2, size or 350_000,
             lambda root, n, size: dvs128_gesture(root, n - n // 2, n // 2, size, extracted=True), aedat31,
             functools.partial(DVS128Gesture, train=True, **plain),  # makes the frames of the test set, too
             spikingjelly.load_aedat_v3, recordings.dvs128_gesture, aedat.read_aedat31, None),
    ]  # fmt: skip


@contextlib.contextmanager
def patched(names: Sequence[str]) -> Iterator[None]:
    """With these patches, and without spikingjelly's line for every file."""
    with contextlib.ExitStack() as stack, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for name in names:
            stack.enter_context(mock.patch(name, PATCHES[name][0]))
        yield


def failure(case: Case, root: Path) -> str | None:
    """What spikingjelly's call raises with the numpy installed; the errors behind it are lost in its threads."""
    with patched([MD5]):
        try:
            case.theirs(root)
        except Exception as error:  # any failure is the answer
            return f"{type(error).__name__}: {error}".replace(str(root), "ROOT")
    return None


def clean(root: Path) -> None:
    """Delete all but the raw data; and what was written before shall not reach the disk while the next is timed."""
    for path in root.iterdir():
        if path.name not in RAW:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()


def left_behind(root: Path) -> dict:
    """Bytes of the frames folder and of all else that was made."""
    sizes = {path.relative_to(root).parts: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    frames = sum(size for parts, size in sizes.items() if parts[0].startswith("frames_"))
    return {"frames": frames, "others": sum(size for parts, size in sizes.items() if parts[0] not in RAW) - frames}


def require_equal(case: Case, theirs: Path, ours: Path) -> int:
    """The number of samples; the program ends where a sample is there on one side only, or its frames differ."""
    theirs, ours = theirs / f"frames_number_{FRAMES}_split_by_number", ours / f"frames_{FRAMES}"
    names = {path.relative_to(theirs).with_suffix("") for path in theirs.rglob("*.npz")}
    if odd := names ^ {path.relative_to(ours).with_suffix("") for path in ours.rglob("*.npy")}:
        sys.exit(f"{case.name}: {len(odd)} of the samples are there on one side only, such as {min(odd)}")
    for name in sorted(names):
        if not np.array_equal(np.load(theirs / f"{name}.npz")["frames"], np.load(ours / f"{name}.npy")):
            sys.exit(f"{case.name}: the frames of {name} differ")
    return len(names)


def rates(count: int, seconds: dict[str, list[float]]) -> dict[str, dict]:
    """For each side how many of `count` things it does a second, and the ratio of its median to spikingjelly's."""
    figures = {}
    for side, values in seconds.items():
        low, median, high = (count / s for s in (max(values), statistics.median(values), min(values)))
        ratio = statistics.median(seconds[PLAIN]) / statistics.median(values)
        figures[side] = {"min": low, "median": median, "max": high, "ratio": ratio, "seconds": values}
    return figures


def time_all(case: Case, theirs: Path, ours: Path, patches: Sequence[str], repeats: int) -> dict:
    """From raw files to frames on disk, the sides in turns."""
    seconds, sizes = {PLAIN: [], COLD: [], WARM: []}, {}
    make = functools.partial(prepare, ours, FRAMES, functools.partial(case.find, ours, False), show=False)
    for _ in range(repeats):
        clean(theirs)
        with patched(patches):
            seconds[PLAIN].append(timeit(functools.partial(case.theirs, theirs), number=1))
        sizes[PLAIN] = left_behind(theirs)
        for side in (COLD, WARM):
            clean(ours)
            if side == COLD:  # a script prepares once, and has to wait for the workers to start
                get_reusable_executor().shutdown(wait=True)
            seconds[side].append(timeit(make, number=1))
            sizes[side] = left_behind(ours)
            samples = require_equal(case, theirs, ours)
    figures = rates(case.recordings, seconds)
    return {"samples": samples, "recordings_per_s": {side: figures[side] | {"bytes": sizes[side]} for side in figures}}


def time_step(case: Case, path: Path, patches: Sequence[str]) -> dict:
    """From a file that the system holds in memory to an array of frames, in one thread."""
    path.write_bytes(case.encode(*events(0, 10, case.events, np.random.default_rng(0))))
    count, side = spikingjelly.integrate_events_by_fixed_frames_number, aedat.SIDE
    calls = {
        PLAIN: lambda: count(case.load(str(path)), "number", FRAMES, side, side),
        COLD: lambda: integrate(case.decode(path.read_bytes()), FRAMES),
    }
    with patched(patches):
        seconds = {name: repeat(call, number=1, repeat=STEPS) for name, call in calls.items()}
    return {"events_per_s": rates(case.events, seconds)}


def measure(case: Case, root: Path, repeats: int) -> dict:
    """All figures of a data set."""
    theirs, ours = root / case.name / "theirs", root / case.name / "ours"
    case.write(theirs, case.recordings, case.events)
    shutil.copytree(theirs, ours)
    (theirs / "download").mkdir()  # where it is absent, spikingjelly fetches the data set
    error = failure(case, theirs) if case.remedy else None
    patches = [MD5, case.remedy] if error else [MD5]
    sizes = {"recordings": case.recordings, "events_per_sample": case.events}
    notes = {"failure_without_patch": error, "patched": {name: PATCHES[name][1] for name in patches}}
    return sizes | notes | time_all(case, theirs, ours, patches, repeats) | time_step(case, root / "one", patches)


def table(name: str, result: dict) -> str:
    """The figures of a data set, for people."""
    sizes = "{recordings} recordings, {samples} samples of {events_per_sample:,} events"
    lines = [f"{name}: {sizes.format(**result)}"]
    kinds = ("recordings_per_s", 1, "recordings/s to the disk"), ("events_per_s", 1e6, "million events/s, one thread")
    for key, unit, title in kinds:
        rows = [(title, "min", "median", "max", "ratio", "MB left: frames + others" if unit == 1 else "")]
        for side, values in result[key].items():
            numbers = [f"{values[name] / unit:.2f}" for name in ("min", "median", "max")]
            megabytes = " + ".join(f"{size / 1e6:.1f}" for size in values.get("bytes", {}).values())
            rows.append((side, *numbers, f"{values['ratio']:.1f}", megabytes))
        lines += ["  {:<34} {:>8} {:>8} {:>8} {:>7}  {}".format(*row).rstrip() for row in rows]
    if result["failure_without_patch"]:
        lines.append(f"  spikingjelly's call, as it is, ends with {result['failure_without_patch']}")
    lines += [f"  for the timing of spikingjelly's call {name} {what}" for name, what in result["patched"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="how often each side prepares each data set (3)")
    parser.add_argument("--recordings", type=int, help="of each class of CIFAR10-DVS (3), and of DVS128 Gesture (2)")
    parser.add_argument("--events", type=int, help="of each recording of CIFAR10-DVS (200,000) and gesture (350,000)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    logger.setLevel(logging.ERROR)  # it warns of data sets smaller than the published ones
    report = machine("events", PACKAGES) | {"frames": FRAMES, "repeats": args.repeats, "data_sets": {}}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(args.recordings, args.events):
            report["data_sets"][case.name] = measure(case, Path(folder), args.repeats)
            print(table(case.name, report["data_sets"][case.name]), end="\n\n", flush=True)
    path = result_path(args.output, "events", report["device"])
    write(path, report)
    print(path)


if __name__ == "__main__":
    main()
