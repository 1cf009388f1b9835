"""Tiny data sets in the real formats: a folder of JPEGs, CIFAR's pickles, WebDataset's shards, event recordings.

The images of a class have its colour and the events its place, so that a network learns them in a few steps.
"""

import colorsys
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def pixels(label, classes, size, random):
    """Draw uint8 [size,size,3]: the colour of the class with noise on it."""
    colour = np.array(colorsys.hsv_to_rgb(label / classes, 1, 0.8)) * 255
    return np.clip(colour + random.normal(0, 20, (size, size, 3)), 0, 255).astype(np.uint8)


def image_folder(root, classes=4, train=16, test=9, size=40):
    """Write train/CLASS/*.JPEG and val/CLASS/*.JPEG; val has one image more than `test` per class in total."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for label in range(classes):
            folder = Path(root, split, f"n{label:08d}")
            folder.mkdir(parents=True)
            for i in range(count + (split == "val" and label == 0)):
                Image.fromarray(pixels(label, classes, size, random)).save(folder / f"{label}_{i}.JPEG")
    return Path(root)


def cifar(root, classes, train=150, test=33):
    """Write the pickles of CIFAR-10 or CIFAR-100 as in the extracted archive; images of ten classes."""
    random = np.random.default_rng(0)
    key = "labels" if classes == 10 else "fine_labels"

    def batch(count):
        labels = [i % 10 for i in range(count)]
        images = np.stack([pixels(label, 10, 32, random).transpose(2, 0, 1).ravel() for label in labels])
        return {"data": images, key: labels}

    if classes == 10:
        folder, meta = Path(root, "cifar-10-batches-py"), ("batches.meta", "label_names")
        parts = {f"data_batch_{i}": batch(train // 5) for i in range(1, 6)} | {"test_batch": batch(test)}
    else:
        folder, meta = Path(root, "cifar-100-python"), ("meta", "fine_label_names")
        parts = {"train": batch(train), "test": batch(test)}
    folder.mkdir(parents=True)
    parts[meta[0]] = {meta[1]: [f"class {i}" for i in range(classes)]}
    for name, content in parts.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))  # as published
    return Path(root)


def shards(root, classes=4, train=64, test=37, per_shard=8):
    """Write WebDataset's tar files with `_info.json`, splits "train" and "validation"."""
    random = np.random.default_rng(0)
    Path(root).mkdir(parents=True)
    info = {"name": "tiny", "splits": {}}
    for split, count in (("train", train), ("validation", test)):
        starts = range(0, count, per_shard)
        names = [f"tiny-{split}-{i:04d}.tar" for i in range(len(starts))]
        lengths = [min(per_shard, count - start) for start in starts]
        for name, start, length in zip(names, starts, lengths, strict=True):
            with tarfile.open(Path(root, name), "w") as archive:
                for i in range(start, start + length):
                    add(
                        archive,
                        f"{i:06d}.jpg",
                        encoded(Image.fromarray(pixels(i % classes, classes, 40, random)), "JPEG"),
                    )
                    add(archive, f"{i:06d}.cls", str(i % classes).encode())
        info["splits"][split] = {
            "name": split,
            "num_samples": count,
            "filenames": names,
            "shard_lengths": lengths,
        }
    Path(root, "_info.json").write_text(json.dumps(info))
    return Path(root)


def encoded(image, kind):
    """Return the bytes of an image in a format of Pillow."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def rewrite(path, change):
    """Write a zip or tar archive again after `change` of its {name: content}."""
    is_zip = path.suffix == ".zip"
    with zipfile.ZipFile(path) if is_zip else tarfile.open(path) as old:
        names = old.namelist() if is_zip else old.getnames()
        files = {name: old.read(name) if is_zip else old.extractfile(name).read() for name in names}
    with zipfile.ZipFile(path, "w") if is_zip else tarfile.open(path, "w:gz") as new:
        for name, content in change(files).items():
            new.writestr(name, content) if is_zip else add(new, name, content)


class Payload:
    """Object whose pickle runs a command when it is read."""

    def __reduce__(self):
        return os.system, ("touch " + os.environ["PAYLOAD_MARK"],)


def events(label, classes, count, random):
    """Draw (t, x, y, p) of `count` events in the order of time, around the class's place on the sensor."""
    angle = 2 * np.pi * label / classes
    x, y = (np.clip(64 + 40 * f(angle) + random.normal(0, 8, count), 0, 127).astype(np.int64) for f in (np.cos, np.sin))
    return np.sort(random.integers(0, 1_000_000, count)), x, y, random.integers(0, 2, count)


def aedat2(t, x, y, p):
    """Return a recording of CIFAR10-DVS."""
    address = y << 8 | x << 1 | p
    return b"#!AER-DAT2.0\r\n# a comment\r\n" + np.stack([address, t], 1).astype(">u4").tobytes()


def aedat31(t, x, y, p, per_packet=1000):
    """Return a recording of DVS128 Gesture; a packet of another type precedes each packet of events."""
    words = np.stack([x << 17 | y << 2 | p << 1 | 1, t], 1).astype("<u4")
    content = [b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n"]
    for start in range(0, len(words), per_packet):
        packet = words[start : start + per_packet]
        content += [struct.pack("<HHIIIIII", 0, 1, 8, 4, 0, 1, 1, 1), bytes(8)]
        content += [struct.pack("<HHIIIIII", 1, 1, 8, 4, 0, len(packet), len(packet), len(packet)), packet.tobytes()]
    return b"".join(content)


def atis(t, x, y, p):
    """Return a recording of N-MNIST or N-Caltech101."""
    return np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1).astype(np.uint8).tobytes()


def cifar10_dvs(root, per_class=10, count=500):
    """Write download/CLASS.zip, each with CLASS/cifar10_CLASS_NUMBER.aedat."""
    random = np.random.default_rng(0)
    Path(root, "download").mkdir(parents=True)
    for label, name in enumerate(CIFAR10_CLASSES):
        with zipfile.ZipFile(Path(root, "download", f"{name}.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(per_class):
                archive.writestr(f"{name}/cifar10_{name}_{i}.aedat", aedat2(*events(label, 10, count, random)))
    return Path(root)


def dvs128_gesture(root, train=4, test=1, count=500, extracted=False):
    """Write download/DvsGesture.tar.gz or its content: recordings of all gestures, the last of them twice."""
    random = np.random.default_rng(0)
    files = {"gesture_mapping.csv": b"", "errata.txt": b""}
    lists = {"train": [], "test": []}
    for i in range(train + test):
        name = f"user{i + 1:02d}_led"
        lists["train" if i < train else "test"].append(f"{name}.aedat")
        gestures = [*range(1, 12), 11]
        spans = [(1_500_000 * k, 1_500_000 * k + 1_000_000) for k in range(len(gestures))]
        parts = [events(gesture - 1, 11, count, random) for gesture in gestures]
        parts = [(t + start, x, y, p) for (t, x, y, p), (start, _) in zip(parts, spans, strict=True)]
        files[f"{name}.aedat"] = aedat31(*map(np.concatenate, zip(*parts, strict=True)))
        rows = [f"{gesture},{start},{end}" for gesture, (start, end) in zip(gestures, spans, strict=True)]
        files[f"{name}_labels.csv"] = "\n".join(["class,startTime_usec,endTime_usec", *rows, ""]).encode()
    files |= {f"trials_to_{part}.txt": "\n".join([*names, ""]).encode() for part, names in lists.items()}
    archive = Path(root, "download", "DvsGesture.tar.gz")
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as file:
        for name, content in files.items():
            add(file, f"DvsGesture/{name}", content)
    if extracted:
        shutil.unpack_archive(archive, Path(root, "extract"), filter="data")
        shutil.rmtree(archive.parent)
    return Path(root)
