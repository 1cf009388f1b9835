"""Frames of recordings, [T,2,H,W] in the smallest unsigned type for the counts of OFF and ON events.

The processes that make frames import this file, so it imports little.
"""

import io
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..cli import UserError
from .aedat import SIDE, DamagedRecording, Events, read_aedat

LARGEST = 2**30  # bytes; no real recording has as many
WHOLE = (-math.inf, math.inf)
Spans = Mapping[str, tuple[float, float]]  # name of a sample -> its time span in microseconds
Reader = Callable[[], bytes]  # returns the content of a file


class Layout(NamedTuple):
    """Frames [T,2,S,S] of a network's input, and the sensor of their events."""

    time_steps: int
    sensor: tuple[int, int]  # height and width in pixels
    side: int  # S

    @property
    def folder(self) -> str:
        """Name of the folder of these frames."""
        resized = "" if self.sensor == (self.side, self.side) else "_of_{}x{}".format(*self.sensor)
        return f"frames_{self.time_steps}" + ("" if self.side == SIDE and not resized else f"_{self.side}{resized}")


def read_numpy(content: bytes) -> Events | np.ndarray:
    """Return the events or the frames [T,2,H,W] of an .npz or .npy file.

    Events are arrays t, x, y, p (spikingjelly) or a structured array (tonic); p is 0 or -1 for OFF and 1 for ON.
    Frames are an array `frames` (spikingjelly) or the only array.
    """
    if not content.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY")):
        raise DamagedRecording("neither .npz nor .npy inside")  # numpy would advise to unpickle it
    data = np.load(io.BytesIO(content), allow_pickle=False)
    names = data.dtype.names or () if isinstance(data, np.ndarray) else data.files
    if set("txyp") <= set(names):
        t, x, y, p = (data[name] for name in "txyp")
        is_sound = len(t) == len(x) == len(y) == len(p) and not np.isnan(t).any() and np.isin(p, (-1, 0, 1)).all()
        if not is_sound or any((pixels < 0).any() or (pixels % 1).any() for pixels in (x, y)):
            raise DamagedRecording("t, x, y, p: wrong lengths, times, pixels or polarities")
        return Events(t, x.astype(np.int64), y.astype(np.int64), (p > 0).astype(np.int64))
    frames = data["frames"] if "frames" in names else data
    if getattr(frames, "shape", ())[1:2] != (2,) or frames.ndim != 4:
        raise DamagedRecording("neither events (t, x, y, p) nor frames [T,2,H,W]")
    if (frames < 0).any() or (frames != np.rint(frames)).any():
        raise DamagedRecording("frames that are not counts (integers from 0)")
    return frames


def read_atis(content: bytes) -> Events:
    """Return the events of a .bin file of N-MNIST or N-Caltech101, 40 bits each."""
    if len(content) % 5:
        raise DamagedRecording(f"{len(content):,} bytes are no whole number of events of 5 bytes")
    x, y, high, middle, low = np.frombuffer(content, np.uint8).reshape(-1, 5).T.astype(np.int64)
    overflows = y == 240  # of the time; the sensor has no such row
    t = ((high & 127) << 16 | middle << 8 | low) + (np.cumsum(overflows) << 13)
    return Events(*(values[~overflows] for values in (t, x, y, high >> 7)))


def read_aedat4(content: bytes) -> Events:
    """Return the events of an AEDAT 4 recording, by the package `aedat`."""
    try:
        import aedat
    except ImportError:
        raise DamagedRecording("AEDAT 4 needs the package aedat; pip install aedat") from None
    with tempfile.TemporaryDirectory() as folder:  # the package reads only files
        path = Path(folder, "recording.aedat4")
        path.write_bytes(content)
        events = np.concatenate([packet["events"] for packet in aedat.Decoder(path) if "events" in packet])
    return Events(events["t"], *(events[name].astype(np.int64) for name in ("x", "y", "on")))


DECODERS = {".aedat": read_aedat, ".aedat4": read_aedat4, ".bin": read_atis, ".npy": read_numpy, ".npz": read_numpy}


def integrate(events: Events, frames: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Count the N events of each pixel and polarity in frames of N // frames events; the last one takes the rest.

    The counts equal those of spikingjelly's `integrate_events_by_fixed_frames_number` with `split_by="number"`.
    """
    count = len(events.t)
    if count < frames:
        raise DamagedRecording(f"only {count} events for {frames} frames (--time-steps)")
    rows, columns = events.y.max() + 1, events.x.max() + 1
    if rows > height or columns > width:
        fix = "give the sensor's in --sensor-size"
        raise DamagedRecording(f"{rows} x {columns} pixels, more than {height} x {width}; {fix}")
    sizes = np.full(frames, count // frames)
    sizes[-1] += count % frames
    frame = np.repeat(np.arange(frames, dtype=np.uint32), sizes)
    cells = ((frame * 2 + events.p) * height + events.y) * width + events.x
    shape = (frames, 2, height, width)
    counts = np.bincount(cells, minlength=np.prod(shape)).reshape(shape)
    return counts.astype(np.min_scalar_type(counts.max()))


def to_frames(recording: Events | np.ndarray, layout: Layout, span: tuple[float, float] = WHOLE) -> np.ndarray:
    """Return the frames [T,2,S,S] of the events in a time span, or of other frames [T,2,H,W]."""
    frames = recording
    if isinstance(recording, Events):
        is_inside = (recording.t >= span[0]) & (recording.t < span[1])
        events = Events(*(values[is_inside] for values in recording[:4]))
        frames = integrate(events, layout.time_steps, *layout.sensor)
    if len(frames) != layout.time_steps:
        raise DamagedRecording(f"{len(frames)} frames instead of {layout.time_steps} (--time-steps)")
    if frames.shape[2:] != (layout.side, layout.side):
        rows, columns = (_resizing(size, layout.side) for size in frames.shape[2:])
        frames = rows @ frames @ columns.T
    return frames.astype(np.min_scalar_type(int(frames.max())), copy=False)


def _resizing(size: int, side: int) -> np.ndarray:
    """Return the matrix [side,size] of zeros and ones that adds up pixels, or repeats them if `side` is larger."""
    if side > size:
        return np.eye(size)[np.arange(side) * size // side]
    return np.eye(side)[np.arange(size) * side // size].T


def frames_of(name: str, read: Reader, samples: Spans, layout: Layout) -> tuple[dict[str, np.ndarray], int]:
    """Return each sample's frames from a file of events or frames, and the number of its invalid events."""
    frames, sample = {}, ""
    try:
        if (suffix := Path(name).suffix.lower()) not in DECODERS:
            raise DamagedRecording(f"{suffix or 'a name without suffix'} is none of {', '.join(DECODERS)}")
        recording = DECODERS[suffix](read())
        for sample, span in samples.items():
            frames[sample] = to_frames(recording, layout, span)
    except Exception as error:  # a damaged file makes its reader fail in any way
        problem = f"{sample if len(samples) > 1 else ''} {str(error) or type(error).__name__}".strip()[:150]
        raise UserError(f"{name}: unusable recording ({problem}); correct or replace it") from None
    return frames, getattr(recording, "invalid", 0)


def convert(name: str, read: Reader, samples: Spans, layout: Layout, folder: Path) -> tuple[str | None, int]:
    """Write frames to files of `folder`, each atomically; return the error and the number of invalid events."""
    try:
        frames, invalid = frames_of(name, read, samples, layout)
    except UserError as error:
        return str(error), 0
    for sample, array in frames.items():
        path = folder / sample
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"{path}: cannot be written ({error}); free some space and start again") from None
    return None, invalid


def read_member(path: Path, member: str) -> bytes:
    """Return the content of a file in a zip archive."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others unpack without a limit
        if info.file_size > LARGEST or info.compress_type not in kinds:
            raise DamagedRecording("too large, or compressed with another method than deflate")
        return archive.open(info).read(info.file_size)
