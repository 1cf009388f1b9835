"""Synthetic data in the true formats and of realistic size: recordings, images and CIFAR's files."""

import io
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from engine.data.aedat import SIDE, Events
from engine.data.recordings import CIFAR10_DVS, GESTURES

JPEG_SIZE, QUALITY = (500, 375), 89


def events(count: int, random: np.random.Generator) -> Events:
    """Draw events in the order of time, around the centre of the sensor."""
    x, y = (np.clip(random.normal(SIDE / 2, 24, count), 0, SIDE - 1).astype(np.int64) for _ in range(2))
    return Events(np.sort(random.integers(0, 1_000_000, count)), x, y, random.integers(0, 2, count))


def aedat2(sample: Events) -> bytes:
    """Format a recording of CIFAR10-DVS."""
    address = sample.y << 8 | sample.x << 1 | sample.p
    return b"#!AER-DAT2.0\r\n" + np.stack([address, sample.t], 1).astype(">u4").tobytes()


def aedat31(sample: Events, per_packet: int = 1000) -> bytes:
    """Format a recording of DVS128 Gesture."""
    words = np.stack([sample.x << 17 | sample.y << 2 | sample.p << 1 | 1, sample.t], 1).astype("<u4")
    content = [b"#!AER-DAT3.1\r\n#!END-HEADER\r\n"]
    for packet in np.split(words, range(per_packet, len(words), per_packet)):
        content += [struct.pack("<HHIIIIII", 1, 1, 8, 4, 0, *[len(packet)] * 3), packet.tobytes()]
    return b"".join(content)


def write_cifar10_dvs(root: Path, count: int, size: int) -> None:
    """Write `count` recordings of `size` events in all, as the archives unpack."""
    random, classes = np.random.default_rng(0), list(CIFAR10_DVS)
    for i in range(count):
        name = classes[i % len(classes)]
        path = root / "extract" / name / f"cifar10_{name}_{i // len(classes)}.aedat"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(aedat2(events(size, random)))


def write_dvs128_gesture(root: Path, count: int, size: int) -> None:
    """Write `count` recordings of all gestures with `size` events each, the last gesture twice; half are for tests."""
    random, folder = np.random.default_rng(0), root / "extract/DvsGesture"
    folder.mkdir(parents=True)
    names = [f"user{i + 1:02d}_led" for i in range(count)]
    for name in names:
        rows, parts = ["class,startTime_usec,endTime_usec"], []
        for i, gesture in enumerate([*range(1, len(GESTURES) + 1), len(GESTURES)]):
            start = 1_500_000 * i
            sample = events(size, random)
            parts.append(sample._replace(t=sample.t + start))
            rows.append(f"{gesture},{start},{start + 1_000_000}")
        (folder / f"{name}.aedat").write_bytes(aedat31(Events(*map(np.concatenate, zip(*parts, strict=True)))))
        (folder / f"{name}_labels.csv").write_text("\n".join([*rows, ""]))
    for part, chosen in (("train", names[: (count + 1) // 2]), ("test", names[(count + 1) // 2 :])):
        (folder / f"trials_to_{part}.txt").write_text("".join(f"{name}.aedat\n" for name in chosen))


def write_cifar(data_set: type[CIFAR10], classes: int, root: Path, train: int, test: int) -> None:
    """Write the pickles of CIFAR-10 or CIFAR-100, as the archive unpacks."""
    random, folder = np.random.default_rng(0), root / data_set.base_folder
    folder.mkdir(parents=True)
    files = {name: -(-train // len(data_set.train_list)) for name, _ in data_set.train_list}
    for name, count in (files | {name: test for name, _ in data_set.test_list}).items():
        images = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": [i % classes for i in range(count)]}, 2))
    names = {data_set.meta["key"]: [f"class {i}" for i in range(classes)]}
    (folder / data_set.meta["filename"]).write_bytes(pickle.dumps(names, 2))


def jpeg(random: np.random.Generator) -> bytes:
    """Draw a JPEG of 110 kB, as in ImageNet's training set (115 on average): coarse noise with fine noise on it."""
    coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(JPEG_SIZE)
    image = np.asarray(coarse) + random.normal(0, 24, (*JPEG_SIZE[::-1], 1))
    file = io.BytesIO()
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def fill(contents: Sequence[bytes], paths: Sequence[Path]) -> None:
    """Write `contents` to the first paths; make all others hard links to them, in turns."""
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True)
    for i, path in enumerate(paths):
        if i < len(contents):
            path.write_bytes(contents[i])
        else:
            path.hardlink_to(paths[i % len(contents)])
