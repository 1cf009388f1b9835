"""Frames from recordings, and the files that hold them; preparing processes import this, so it imports little.

Shapes: T frames, 2 polarities, H and W pixels; frames are [T,2,H,W] in the smallest unsigned type for the counts.
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

LARGEST = 2**30  # bytes of a recording; no real one has as many
WHOLE = (-math.inf, math.inf)


class Layout(NamedTuple):
    """Frames [T,2,S,S] that a network takes, and the sensor that their events come from."""

    time_steps: int
    sensor: tuple[int, int]  # height and width in pixels
    side: int  # S

    @property
    def folder(self) -> str:
        """Name of the folder that keeps such frames."""
        resized = "" if self.sensor == (self.side, self.side) else "_of_{}x{}".format(*self.sensor)
        return f"frames_{self.time_steps}" + ("" if self.side == SIDE and not resized else f"_{self.side}{resized}")


def read_numpy(content: bytes) -> Events | np.ndarray:
    """Return the events or the frames [T,2,H,W] of an .npz or .npy file.

    Events are arrays t, x, y, p as in spikingjelly's `events_np`, or one structured array as in tonic; frames are an
    array `frames` as in spikingjelly's folders of frames, or the only array. OFF is polarity 0 or -1, ON is 1.
    """
    data = np.load(io.BytesIO(content), allow_pickle=False)
    names = data.dtype.names or () if isinstance(data, np.ndarray) else data.files
    if set("txyp") <= set(names):
        t, x, y, p = (data[name] for name in "txyp")
        is_sound = len(t) == len(x) == len(y) == len(p) and not np.isnan(t).any() and np.isin(p, (-1, 0, 1)).all()
        if not is_sound or any((pixels < 0).any() or (pixels % 1).any() for pixels in (x, y)):
            raise DamagedRecording("its t, x, y, p are no events: lengths, times, pixels or polarities are wrong")
        return Events(t, x.astype(np.int64), y.astype(np.int64), (p > 0).astype(np.int64))
    frames = data["frames"] if "frames" in names else data
    if getattr(frames, "shape", ())[1:2] != (2,) or frames.ndim != 4:
        raise DamagedRecording("holds neither events (t, x, y, p) nor frames [T,2,H,W]")
    if (frames < 0).any() or (frames != np.rint(frames)).any():
        raise DamagedRecording("its frames are no counts of events (integers from 0)")
    return frames


def read_atis(content: bytes) -> Events:
    """Return the events of a .bin file of N-MNIST or N-Caltech101, 40 bits each."""
    if len(content) % 5:
        raise DamagedRecording(f"{len(content):,} bytes are no whole number of events of 5 bytes")
    x, y, high, middle, low = np.frombuffer(content, np.uint8).reshape(-1, 5).T.astype(np.int64)
    overflows = y == 240  # rows that the sensor lacks mark them
    t = ((high & 127) << 16 | middle << 8 | low) + (np.cumsum(overflows) << 13)
    return Events(*(values[~overflows] for values in (t, x, y, high >> 7)))


def read_aedat4(content: bytes) -> Events:
    """Return the events of an AEDAT 4 recording, by the package `aedat`."""
    try:
        import aedat
    except ImportError:
        raise DamagedRecording("AEDAT 4 needs the package aedat; pip install aedat") from None
    with tempfile.TemporaryDirectory() as folder:  # the package reads files alone
        path = Path(folder, "recording.aedat4")
        path.write_bytes(content)
        events = np.concatenate([packet["events"] for packet in aedat.Decoder(path) if "events" in packet])
    return Events(events["t"], *(events[name].astype(np.int64) for name in ("x", "y", "on")))


DECODERS = {
    ".aedat": read_aedat,
    ".aedat4": read_aedat4,
    ".bin": read_atis,
    ".npy": read_numpy,
    ".npz": read_numpy,
}


def decode(name: str, content: bytes) -> Events | np.ndarray:
    """Return the events or the frames [T,2,H,W] in a file; damaged ones raise errors of any kind."""
    if (suffix := Path(name).suffix.lower()) not in DECODERS:
        raise DamagedRecording(f"{suffix or 'a name without suffix'} is none of {', '.join(DECODERS)}")
    return DECODERS[suffix](content)


def integrate(events: Events, frames: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Count the events of each pixel and polarity in parts of N // frames events; the last part takes the rest.

    Equals spikingjelly's `integrate_events_by_fixed_frames_number` with `split_by="number"`, as unsigned integers
    [frames,2,height,width]. Fewer events than frames, or events outside the sensor, raise DamagedRecording.
    """
    count = len(events.t)
    if count < frames:
        raise DamagedRecording(f"{count} events are too few for {frames} frames (--time-steps)")
    rows, columns = events.y.max() + 1, events.x.max() + 1
    if rows > height or columns > width:
        raise DamagedRecording(f"{rows} x {columns} pixels, the sensor has {height} x {width} (--sensor-size)")
    sizes = np.full(frames, count // frames)
    sizes[-1] += count % frames
    frame = np.repeat(np.arange(frames, dtype=np.uint32), sizes)
    cells = ((frame * 2 + events.p) * height + events.y) * width + events.x
    shape = (frames, 2, height, width)
    counts = np.bincount(cells, minlength=np.prod(shape)).reshape(shape)
    return counts.astype(np.min_scalar_type(counts.max()))


def to_frames(recording: Events | np.ndarray, layout: Layout, span: tuple[float, float] = WHOLE) -> np.ndarray:
    """Return the frames of a layout, [T,2,S,S] unsigned, of the events in a time span, or of frames [T,2,H,W].

    Where S is smaller than the sensor, the pixels that fall on one are added up; where it is larger, they are repeated.
    """
    frames = recording
    if isinstance(recording, Events):
        frames = integrate(recording.between(*span), layout.time_steps, *layout.sensor)
    if len(frames) != layout.time_steps:
        raise DamagedRecording(f"{len(frames)} frames instead of {layout.time_steps} (--time-steps)")
    if frames.shape[2:] != (layout.side, layout.side):
        rows, columns = (_resizing(size, layout.side) for size in frames.shape[2:])
        frames = rows @ frames @ columns.T
    return frames.astype(np.min_scalar_type(int(frames.max())), copy=False)


def _resizing(size: int, side: int) -> np.ndarray:
    """Return the matrix [side,size] of zeros and ones that adds up or repeats pixels."""
    if side > size:
        return np.eye(size)[np.arange(side) * size // side]
    return np.eye(side)[np.arange(size) * side // size].T


def convert(
    name: str, read: Callable[[], bytes], samples: Mapping[str, tuple[float, float]], folder: Path, layout: Layout
) -> tuple[str | None, int]:
    """Write the frames of each of a recording's `samples` (file -> time span in microseconds) to `folder`.

    Returns the recording's problem, if there is one, and the number of its invalid events.
    """
    sample = ""
    try:
        recording = decode(name, read())
        for sample, span in samples.items():
            _save(folder / sample, to_frames(recording, layout, span))
    except UserError:
        raise
    except Exception as error:  # a damaged archive makes its reader fail in any way
        if getattr(error, "filename", None):  # the disk fails, not the recording
            raise
        return f"{sample if len(samples) > 1 else ''} {str(error) or type(error).__name__}".strip()[:150], 0
    return None, getattr(recording, "invalid", 0)


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
