"""Frames from events, and the files that hold them. What worker processes run: it imports little.

Shapes: T frames, 2 polarities, H and W pixels; frames are [T,2,H,W] in the smallest unsigned type for the counts.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..errors import UserError
from .aedat import SIDE, DamagedRecording, Events


def integrate(events: Events, frames: int, side: int = SIDE) -> np.ndarray:
    """Count the events of each pixel and polarity in parts of N // frames events, the last of which takes the rest.

    Equals spikingjelly's `integrate_events_by_fixed_frames_number` with `split_by="number"`.

    Returns:
        [frames,2,side,side], unsigned integers.

    Raises:
        DamagedRecording: there are fewer events than frames.
    """
    count = len(events.t)
    if count < frames:
        raise DamagedRecording(f"holds {count} events, too few for {frames} frames")
    sizes = np.full(frames, count // frames)
    sizes[-1] += count % frames
    frame = np.repeat(np.arange(frames, dtype=np.uint32), sizes)
    cells = ((frame * 2 + events.p) * side + events.y) * side + events.x
    shape = (frames, 2, side, side)
    counts = np.bincount(cells, minlength=np.prod(shape)).reshape(shape)
    return counts.astype(np.min_scalar_type(counts.max()))


def convert(
    read: Callable[[], bytes],
    decode: Callable[[bytes], Events],
    samples: Mapping[str, tuple[int, int] | None],
    folder: Path,
    frames: int,
) -> str | None:
    """Write the frames of each of a recording's samples, and return what is wrong with the recording, if something is.

    Args:
        read: gives the file's content.
        decode: gives the content's events.
        samples: file in `folder` -> time span in microseconds, or None for the whole recording.
    """
    try:
        events = decode(read())
        for (name, span), part in zip(samples.items(), events.cut(samples.values()), strict=True):
            try:
                _save(folder / name, integrate(part, frames))
            except DamagedRecording as error:
                return str(error) if span is None else f"from {span[0]} to {span[1]} us {error}"
    except (DamagedRecording, zipfile.BadZipFile, zlib.error, EOFError) as error:
        return str(error)
    return None


def _save(path: Path, frames: np.ndarray) -> None:
    """Killed at any moment, there is the whole file or none."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, frames, allow_pickle=False)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}; what is done stays, and the next start goes on") from None
