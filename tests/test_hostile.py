"""No data file runs code, is written outside its place or takes the machine; a broken one ends in one clear line."""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib

import numpy as np
import pytest
import timm.data.dataset
import torchvision.datasets.cifar
from PIL import EpsImagePlugin, Image
from scripts import ROOT, fail
from tiny_data import cifar, image_folder, shards

from engine import config, dist
from engine.data import datasets
from engine.data.datasets import create_dataset
from engine.errors import UserError
from engine.log import logger
from engine.run import create_data


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """What a payload leaves behind where it runs."""
    monkeypatch.setenv("PAYLOAD_MARK", str(tmp_path / "ran"))
    return tmp_path / "ran"


class Payload:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["PAYLOAD_MARK"],)


def dataset(recipe, *flags, train=True):
    return create_dataset(config.load(ROOT / recipe, list(map(str, flags))), train)


def refusal(recipe, *flags, train=True):
    """The line in which the data set is refused, as it is made."""
    with pytest.raises(UserError) as error:
        dataset(recipe, *flags, train=train)
    return str(error.value)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Flags for CIFAR-10 in `tmp_path`, whose files need not be the published ones; and what rewrites one."""
    for module in (torchvision.datasets.cifar, datasets):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))
    folder = cifar(tmp_path, 10, train=10, test=10) / "cifar-10-batches-py"

    def rewrite(file, **entries):
        content = pickle.loads((folder / file).read_bytes())
        (folder / file).write_bytes(pickle.dumps(content | entries, protocol=2))

    return ["cifar10/cifar10.yml", "--data-path", tmp_path], rewrite


class OfPython2(pickle._Pickler):
    """Writes bytes as the published files have them."""

    def save_bytes(self, content):
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)
        self.memoize(content)

    dispatch = pickle._Pickler.dispatch | {bytes: save_bytes}


@pytest.mark.parametrize("order", "CF")
def test_cifars_pickles_give_arrays(order, tmp_path, cifar10):
    flags, _ = cifar10
    path = tmp_path / "cifar-10-batches-py/test_batch"
    content = pickle.loads(path.read_bytes())
    with path.open("wb") as file:
        OfPython2(file, 2).dump(content | {"data": np.asarray(content["data"], order=order)})
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    read = dataset(*flags, train=False)
    assert np.array_equal(read.data, content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert read.targets == content["labels"]


@pytest.mark.parametrize("place", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_payload_in_cifars_pickles_does_not_run(place, cifar10, mark):
    flags, rewrite = cifar10
    rewrite(place, extra=Payload())
    assert "refused: it holds posix.system, not plain data" in refusal(*flags, train=place != "test_batch")
    assert not mark.exists()
    rewrite(place)  # reads it as others do
    assert mark.exists()


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("data_batch_1", {"data": np.zeros((2, 3072))}, "cannot reshape array of size 49152 into shape (2,3072)"),
        ("data_batch_1", {"data": np.zeros((2, 3072), object)}, "a bytes-like object is required"),
        ("data_batch_1", {"data": [list(range(3072))]}, "its images, labels or names are damaged"),
        ("data_batch_1", {"labels": [1]}, "its images, labels or names are damaged"),
        ("data_batch_1", {"labels": 5}, "'int' object is not iterable"),
        ("batches.meta", {"label_names": list(range(10))}, "its images, labels or names are damaged"),
    ],
)
def test_damaged_pickles_are_refused(file, entries, message, cifar10):
    flags, rewrite = cifar10
    rewrite(file, **entries)
    assert message in refusal(*flags)


IMAGENET = ["imagenet/qkformer_10_384.yml", "--num-classes", "4", "--data-path"]


def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def tar(path, files, mode="w"):
    """Write an archive of members, name -> content."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(side):
    """A picture of `side` x `side` pixels, most of which are missing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(9)))


RED = Image.new("RGB", (8, 8), (255, 0, 0))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot identify image file"),
        (encoded(RED, "BMP")[:-9], "truncated"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot identify image file"),
        (png(50_000), "could be decompression bomb DOS attack"),
        (encoded(RED, "EPS"), "cannot identify image file"),
    ],
    ids=["empty", "cut", "svg", "bomb", "eps"],
)
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_what_is_no_image_is_named(kind, content, reason, tmp_path):
    where = ["--workers", "0", "--input-size", "32", *IMAGENET[1:], tmp_path / "data"]
    if kind == "folder":
        path = image_folder(tmp_path / "data", train=1, test=1) / "val/n00000001/1_0.JPEG"
        path.write_bytes(content)
        name = f"{path}: cannot be read as an image ("
    else:
        path = shards(tmp_path / "data", train=8, test=8) / "tiny-validation-0000.tar"
        tar(path, {"3.jpg": content, "3.cls": b"0"})
        name = f"a sample of the shards cannot be read (3 in {path}: "
        where = ["--dataset", "wds/tiny", *where]
    data = create_data(config.load(ROOT / IMAGENET[0], list(map(str, where))), dist.setup("cpu"), train=False)
    with pytest.raises(UserError) as error:
        list(data.test)
    assert name in str(error.value)
    assert reason in str(error.value)


def test_postscript_is_not_run(tmp_path, monkeypatch, mark):
    """Pillow hands it to the program gs, here one that leaves a mark."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(RED, "EPS"))
    with pytest.raises(UserError, match=r"a.jpg: cannot be read as an image"):
        datasets.read_image(path)
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(path)
    assert not mark.exists()
    with pytest.raises(OSError, match="cannot identify"):  # what gs was to draw
        Image.open.func(path).load()
    assert mark.exists()


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"])
def test_the_formats_of_photographs_are_read(kind, tmp_path):
    (tmp_path / "a").write_bytes(encoded(RED, kind))
    assert datasets.read_image(tmp_path / "a").getpixel((4, 4))[0] > 250


def rewrite_info(root, **entries):
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["train"] |= entries
    (root / "_info.json").write_text(json.dumps(info))


def test_the_name_of_a_shard_is_no_command(tmp_path, mark):
    root = shards(tmp_path / "data", train=8, test=8)
    flags = ["--dataset", "wds/tiny", *IMAGENET[1:], f"pipe:cat {root}"]
    names = ["tiny-train-0000.tar", f"tiny-train-0000.tar; touch {mark}"]
    rewrite_info(root, filenames=names)
    line = refusal(IMAGENET[0], *flags)
    assert f"{names[1]!r} is no shard of the folder" in line
    rewrite_info(root, filenames=names[:1])
    stream = dataset(IMAGENET[0], *flags)
    stream.reader.split_info.filenames = names
    assert not mark.exists()
    next(iter(stream.reader))  # which looks ahead, to shuffle
    assert mark.exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"filenames": ["../x.tar"]}, "'../x.tar' is no shard of the folder"),
        ({"filenames": ["/dev/zero"]}, "'/dev/zero' is no shard of the folder"),
        ({"filenames": [5]}, "5 is no shard of the folder"),
        ({"filenames": None}, "is a file damaged? TypeError("),
        ({"num_samples": "8"}, "_info.json has no num_samples"),
        ({"num_samples": 10**30}, "_info.json has no num_samples"),
        (None, "split train not found in info"),
        (9999 * "[", "split train not found in info"),
        ("[]", "is a file damaged? AttributeError("),
    ],
)
def test_a_damaged_description_of_shards_is_refused(entries, message, tmp_path):
    root = shards(tmp_path / "data", train=8, test=8)
    if isinstance(entries, dict):
        rewrite_info(root, **entries)
    else:
        (root / "_info.json").write_text(entries or "{")
    assert message in refusal(IMAGENET[0], "--dataset", "wds/tiny", *IMAGENET[1:], root)


class Samples(list):
    """Stands in for a reader of timm, of samples (image, label)."""

    split = "train"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, None),
        (np.int64(3), None),
        (4, "a label 4, where num_classes = 4 wants 0 to 3; choose --num-classes or"),
        (-1, "a label -1, where"),
        (None, "a label of type NoneType, where"),
        ("cat", "a label of type str, where"),
        pytest.param(10**5000, "a label of type int, where", id="enormous"),
    ],
)
@pytest.mark.parametrize("kind", ["hfds", "hfids", "tfds"])
def test_a_label_without_an_output_is_named(kind, label, message, monkeypatch):
    image = io.BytesIO(encoded(RED, "PNG")) if kind == "hfds" else RED
    monkeypatch.setattr(timm.data.dataset, "create_reader", lambda *args, **kwargs: Samples([(image, label)]))
    samples = dataset(*IMAGENET[:3], "--dataset", f"{kind}/x")
    if message is None:
        assert next(iter(samples))[1] == label
    else:
        with pytest.raises(UserError, match=f"{kind}/x: {message}"):
            next(iter(samples))


def test_a_label_in_a_file_is_named(tmp_path, cifar10, monkeypatch, capfd):
    flags, rewrite = cifar10
    rewrite("data_batch_1", labels=[10, 0])
    with pytest.raises(UserError, match="torch/cifar10: a label 10, where num_classes = 10 wants 0 to 9"):
        dataset(*flags)[0]
    tar(
        shards(tmp_path / "data", train=8, test=8) / "tiny-train-0000.tar",
        {"3.jpg": encoded(RED, "JPEG"), "3.cls": b"9"},
    )
    small = "--batch-size 8 --workers 1 --time-steps 1 --epochs 9 --input-size 32 --dataset wds/tiny".split()
    where = [*IMAGENET[1:], tmp_path / "data", "--output-dir", tmp_path / "run"]
    line = fail(monkeypatch, capfd, "imagenet/train.py", *small, *where)
    assert line.startswith("error: wds/tiny: a label 9, where num_classes = 4 wants 0 to 3; ")


@pytest.mark.parametrize(
    ("inner", "outer", "how"),
    [
        ("val", "train", "are one folder"),
        ("val", "train/n00000001", "lie one in the other"),
        ("train", "val/n00000001", "lie one in the other"),
    ],
)
def test_training_and_testing_share_no_folder(inner, outer, how, tmp_path):
    root = image_folder(tmp_path / "data", train=2, test=1)
    shutil.rmtree(root / inner)
    (root / inner).symlink_to(root / outer)
    for train in (True, False):
        line = refusal(*IMAGENET, root, train=train)
        assert f"{root}/train and {root}/val {how}: keep the images to test with apart" in line


def test_timm_does_not_train_on_the_whole(tmp_path):
    root = image_folder(tmp_path / "data", train=2, test=1) / "train"
    line = refusal(*IMAGENET, root, "--dataset", "torch/folder")
    assert f"{root} holds no folder train; it should hold one for training and one for testing" in line


def test_copies_of_training_images_are_counted(tmp_path, monkeypatch):
    root, told = image_folder(tmp_path / "data", train=40, test=40), []
    monkeypatch.setattr(logger, "warning", told.append)
    dataset(*IMAGENET, root)
    assert not told  # names alone are equal
    for path in (root / "val/n00000002").iterdir():
        shutil.copy(path, root / "train/n00000002")
    (root / "val/n00000003/3_0.JPEG").unlink()
    (root / "val/n00000003/3_0.JPEG").hardlink_to(root / "train/n00000003/3_0.JPEG")
    dataset(*IMAGENET, root)
    assert f"warning: 14 of 54 images of {root}/val that were looked at are training images too, such as " in told[0]
