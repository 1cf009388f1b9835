"""Synthetic data in real formats and sizes: events, images and CIFAR's files."""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from engine.data.aedat import SIDE, Events

JPEG_SIZE, QUALITY = (500, 375), 89


def events(count: int, random: np.random.Generator) -> Events:
    """Draw events in the order of time, around the centre of the sensor."""
    x, y = (np.clip(random.normal(SIDE / 2, 24, count), 0, SIDE - 1).astype(np.int64) for _ in range(2))
    return Events(np.sort(random.integers(0, 1_000_000, count)), x, y, random.integers(0, 2, count))


def write_cifar(data_set: type[CIFAR10], classes: int, root: Path, train: int, test: int) -> None:
    """Write the pickles of CIFAR-10 or CIFAR-100, as in the extracted archive."""
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
