"""Frames from recordings, and the files that hold them; preparing processes import this, so it imports little.

Shapes: T frames, 2 polarities, H and W pixels; frames are [T,2,H,W] in the smallest unsigned type for the counts.
"""

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..cli import UserError
from .aedat import SIDE, DamagedRecording, Events, read_aedat

LARGEST = 2**30  # bytes of a recording; no real one has as many


def integrate(events: Events, frames: int, side: int = SIDE) -> np.ndarray:
    """Count the events of each pixel and polarity in parts of N // frames events; the last part takes the rest.

    Equals spikingjelly's `integrate_events_by_fixed_frames_number` with `split_by="number"`, as unsigned integers
    [frames,2,side,side]. Fewer events than frames, or events outside the sensor, raise DamagedRecording.
    """
    count = len(events.t)
    if count < frames:
        raise DamagedRecording(f"{count} events are too few for {frames} frames (--time-steps)")
    if max(events.x.max(), events.y.max()) >= side:
        raise DamagedRecording(f"events outside the {side} x {side} pixels of the sensor")
    sizes = np.full(frames, count // frames)
    sizes[-1] += count % frames
    frame = np.repeat(np.arange(frames, dtype=np.uint32), sizes)
    cells = ((frame * 2 + events.p) * side + events.y) * side + events.x
    shape = (frames, 2, side, side)
    counts = np.bincount(cells, minlength=np.prod(shape)).reshape(shape)
    return counts.astype(np.min_scalar_type(counts.max()))


def convert(
    read: Callable[[], bytes], samples: Mapping[str, tuple[float, float]], folder: Path, frames: int, side: int
) -> tuple[str | None, int]:
    """Write the frames of each of a recording's samples to `folder`.

    Args:
        samples: file -> time span in microseconds.

    Returns:
        The recording's problem, if there is one, and the number of its invalid events.
    """
    sample = ""
    try:
        events = read_aedat(read())
        for sample, span in samples.items():
            _save(folder / sample, integrate(events.between(*span), frames, side))
    except UserError:
        raise
    except Exception as error:  # a damaged archive makes its reader fail in any way
        if getattr(error, "filename", None):  # the disk fails, not the recording
            raise
        return f"{sample} {str(error) or type(error).__name__}".strip()[:150], 0
    return None, events.invalid


def read_member(path: Path, member: str) -> bytes:
    """Return the content of a recording in a zip archive."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.file_size > LARGEST:
            raise DamagedRecording(f"{info.file_size:,} bytes are too many for a recording")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
            raise DamagedRecording("packed in an unusual way; extract it")
        with archive.open(info) as file:
            return file.read(info.file_size)


def _save(path: Path, frames: np.ndarray) -> None:
    """Write to another name and rename, so that a crash leaves the whole file or none."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, frames, allow_pickle=False)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); make room and start again, it goes on") from None
