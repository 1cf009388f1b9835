"""Hostile data files: none runs code, writes outside its folder or exhausts memory; broken ones give one line."""

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm.data.dataset
from PIL import EpsImagePlugin, Image
from scripts import ROOT, load_data, refuses
from tiny_data import Payload, cifar10_dvs, dvs128_gesture, encoded, image_folder, rewrite, shards

from engine import config
from engine.data.image import create_dataset


def dataset(recipe, *flags, train=True):
    return create_dataset(config.load(ROOT / recipe, list(map(str, flags))), train)


IMAGENET = ["imagenet/qkformer_10_384.yml", "--num-classes", "4", "--data-path"]


def png(side):
    """Return a truncated picture of `side` x `side` pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    for kind, part in (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(9))),
    ):
        content += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
    return content


RED = Image.new("RGB", (8, 8), (255, 0, 0))


def labels_of_all(root):
    """Read all images of the test set and return their labels."""
    flags = ["--workers", 0, "--input-size", 32, *IMAGENET[1:], root]
    return [label for _, labels in load_data(IMAGENET[0], *flags, train=False).test for label in labels]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        encoded(RED, "BMP")[:-9],
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        png(50_000),
        encoded(RED, "EPS"),
    ],
    ids=["empty", "cut", "svg", "bomb", "eps"],
)
def test_what_is_no_image_is_reported_and_not_run(content, tmp_path, monkeypatch, mark):
    """Use a program gs that leaves a mark, because Pillow passes PostScript to it."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = image_folder(tmp_path / "data", train=1, test=1) / "val/n00000001/1_0.JPEG"
    path.write_bytes(content)
    with refuses(path):
        labels_of_all(tmp_path / "data")
    assert not mark.exists()


def test_the_formats_of_photographs_are_read(tmp_path):
    folder = image_folder(tmp_path / "data", train=1, test=1) / "val/n00000001"
    for kind in ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"):
        (folder / f"{kind}.jpg").write_bytes(encoded(RED, kind))
    assert len(labels_of_all(tmp_path / "data")) == 13


def test_the_name_of_a_shard_is_no_command(tmp_path, mark):
    """Use local files, because the reader runs commands for some addresses."""
    root, flags = shards(tmp_path / "data", train=8, test=8), ["--dataset", "wds/tiny", *IMAGENET[1:]]
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["train"]["filenames"] = [f"pipe:touch {mark}", f"a::pipe:touch {mark}", f"; touch {mark}"]
    (root / "_info.json").write_text(json.dumps(info))
    with refuses("pipe:cat"):
        dataset(IMAGENET[0], *flags, f"pipe:cat {root}")
    next(iter(dataset(IMAGENET[0], *flags, root).reader), None)
    assert not mark.exists()


@pytest.mark.parametrize("content", ["{", "[]", 9999 * "["])
def test_a_damaged_description_of_shards_is_refused(content, tmp_path):
    root = shards(tmp_path / "data", train=8, test=8)
    (root / "_info.json").write_text(content)
    with refuses("wds/tiny"):
        dataset(IMAGENET[0], "--dataset", "wds/tiny", *IMAGENET[1:], root)


@pytest.mark.parametrize(
    ("label", "value"),
    [
        (3, None),
        (np.int64(3), None),
        (4, "4"),
        (-1, "-1"),
        ("cat", "'cat'"),
    ],
)
def test_a_label_without_an_output_is_reported(label, value, monkeypatch):
    reader = [(io.BytesIO(encoded(RED, "PNG")), label)]
    monkeypatch.setattr(timm.data.dataset, "create_reader", lambda *args, **kwargs: reader)
    samples = dataset(*IMAGENET[:3], "--dataset", "hfds/x")
    if value is None:
        assert samples[0][1] == label
    else:
        with refuses("hfds/x", value):
            samples[0]


def test_an_image_of_hugging_face_that_cannot_be_read_is_not_replaced(monkeypatch):
    reader = [(io.BytesIO(b"junk"), 0), (io.BytesIO(encoded(RED, "PNG")), 1)]
    monkeypatch.setattr(timm.data.dataset, "create_reader", lambda *args, **kwargs: reader)
    with refuses("hfds/x"):
        dataset(*IMAGENET[:3], "--dataset", "hfds/x")[0]


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("val", "train"),
        ("val", "train/n00000001"),
        ("train", "val/n00000001"),
    ],
)
def test_training_and_testing_share_no_folder(inner, outer, tmp_path):
    root = image_folder(tmp_path / "data", train=2, test=1)
    shutil.rmtree(root / inner)
    (root / inner).symlink_to(root / outer)
    for train in (True, False):
        with refuses(root / "train", root / "val"):
            dataset(*IMAGENET, root, train=train)


def test_timm_does_not_train_on_the_whole(tmp_path):
    root = image_folder(tmp_path / "data", train=2, test=1) / "train"
    with refuses(root, "train"):
        dataset(*IMAGENET, root, "--dataset", "torch/folder")


GESTURE, CIFAR = "dvs128-gesture/dvs128-gesture.yml", "cifar10-dvs/cifar10-dvs.yml"


def events(recipe, root):
    """Return the training set of event frames in `root`."""
    return load_data(recipe, "--data-path", root, "--workers", 0, "--batch-size", 2).train.dataset


def header(name, size, kind=tarfile.REGTYPE):
    """Return a file's header in a tar archive, without its content."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, "/etc/passwd"
    return bytearray(member.tobuf(tarfile.GNU_FORMAT))


def sparse(name, size):
    """Return the header of a sparse file that is one hole."""
    content = header(name, 0, tarfile.GNUTYPE_SPARSE)
    content[483:495] = b"%011o\0" % size
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return content


GIANTS = {
    "plain": header("x.aedat", 2**40),
    "sparse": sparse("x.aedat", 2**40),
    "pax": header("x", 2**40, tarfile.XHDTYPE),
    "longname": header("x", 2**40, tarfile.GNUTYPE_LONGNAME),
    "backwards": header("x", 0) + header("x", -512),  # older Pythons read the second one forever
    "many": 20_000 * header("x", 0),
}
LINKS = {kind: header("user01_led.aedat", 0, kind) for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)}


@pytest.mark.parametrize("name", [*GIANTS, *LINKS])
def test_a_hostile_tar(name, tmp_path, one_core):
    """Skip links and pipes, next to the true file of the same name."""
    path = dvs128_gesture(tmp_path, train=1, test=1, count=50) / "download/DvsGesture.tar.gz"
    path.write_bytes(gzip.compress((GIANTS | LINKS)[name] + gzip.decompress(path.read_bytes())))
    if name in LINKS:
        assert len(events(GESTURE, tmp_path)) == 12
    else:
        with refuses(path):
            events(GESTURE, tmp_path)


@pytest.mark.parametrize(
    ("content", "size", "method"),
    [
        (b"", 2**31, zipfile.ZIP_DEFLATED),
        (bytes(2**26), 100, zipfile.ZIP_DEFLATED),
        (bytes(2**26), 100, zipfile.ZIP_BZIP2),
        (bytes(2**26), 100, zipfile.ZIP_LZMA),
    ],
    ids=["giant", "deflate", "bzip2", "lzma"],
)
def test_a_zip_bomb(content, size, method, tmp_path, one_core):
    path = cifar10_dvs(tmp_path, per_class=2, count=50) / "download/cat.zip"
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr("cat/x.aedat", content)
        archive.filelist[-1].file_size = size
    tracemalloc.start()
    with refuses(path, "x.aedat"):
        events(CIFAR, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["../../x", "/x", "\x1b[2J", "{0.__class__}"])
def test_names_of_recordings_lead_nowhere_else(name, tmp_path, one_core):
    zipped = cifar10_dvs(tmp_path / "a", per_class=2, count=50)
    again = f"{name}.aedat"
    rewrite(zipped / "download/cat.zip", lambda files: files | {again: files["cat/cifar10_cat_0.aedat"]})

    def change(files):
        files = {Path(old).name: content for old, content in files.items()}
        files |= {f"{name}{end}": files[f"user01_led{end}"] for end in (".aedat", "_labels.csv")}
        files["trials_to_train.txt"] += f"{Path(name).name}.aedat\n".encode()
        return files

    rewrite(dvs128_gesture(tmp_path / "b", train=1, test=1, count=50) / "download/DvsGesture.tar.gz", change)
    before = set(tmp_path.rglob("*"))
    for recipe, root, count in ((CIFAR, tmp_path / "a", 11), (GESTURE, tmp_path / "b", 24)):
        assert len(events(recipe, root)) == count
    new = {path.relative_to(tmp_path).parts[1] for path in set(tmp_path.rglob("*")) - before}
    assert new <= {"frames_16", "frames_16.lock"}


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (b"1,0," + 30 * b"9", 2),
        (b"1,-9,9", 2),
        (b"1,0," + 9999 * b"9", 2),
        (200_000 * b"x", 2),
        (b'"' + 200_000 * b"x", 2),
        (b"1,0,9\r1,0,9\r\n\0", 4),
    ],
)
def test_a_hostile_table_of_labels(rows, line, tmp_path, one_core):
    root = dvs128_gesture(tmp_path, train=1, test=1, count=50, extracted=True)
    path = root / "extract/DvsGesture/user01_led_labels.csv"
    path.write_bytes(b"class\n" + rows)
    with refuses(path.parent, path.name, line) as error:
        events(GESTURE, root)
    assert len(str(error.value)) < 400


def test_giant_files_of_a_folder(tmp_path, one_core):
    root = dvs128_gesture(tmp_path, train=1, test=1, count=50, extracted=True)
    os.truncate(root / "extract/DvsGesture/user01_led.aedat", 2**40)  # a hole
    with refuses("user01_led.aedat"):
        events(GESTURE, root)


def npy(shape, dtype="|u1"):
    """Return the header of an array that claims to be large."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    return file.getvalue() + bytes(99)


@pytest.mark.parametrize(
    "content", [npy((2**50,)), npy((2**62, 2**62)), npy((-1, 5)), npy((16, 2, 128, 128), "|O"), None]
)
def test_a_hostile_file_of_frames(content, tmp_path, one_core, mark):
    frames = events(CIFAR, cifar10_dvs(tmp_path / "data", per_class=2, count=50))
    path = tmp_path / "data/frames_16/airplane/cifar10_airplane_0.npy"
    if content is None:
        np.save(path, np.array([Payload()] * 2, object), allow_pickle=True)
    else:
        path.write_bytes(content)
    with refuses(path):
        frames[0]
    assert not mark.exists()
    if content is None:
        np.load(path, allow_pickle=True)
        assert mark.exists()
