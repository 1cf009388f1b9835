"""Scripts of ImageNet and CIFAR on tiny data in the real formats."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import math
import pickle
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import timm.data.dataset
import timm.utils
import torch
import torchvision.datasets.cifar
from PIL import Image
from scripts import ROOT, load_data, named, refuses
from timm.data.transforms import MaybePILToTensor, ToNumpy
from tiny_data import cifar, image_folder, shards

from engine import config, run, world
from engine.data import image, loaders
from engine.data.image import create_data, create_dataset, read_image
from engine.evaluate import warn_of_other_classes
from engine.optim import create_optimizer
from engine.run import build_model
from engine.trainer import Trainer

IMAGENET = "--num-classes 4 --input-size 32".split()
SHARDS = "--dataset wds/tiny --num-classes 4 --data-path".split()


def load(*flags, **how):
    return load_data("imagenet/qkformer_10_384.yml", *flags, **how)


def training_set(*flags):
    return create_dataset(config.load(ROOT / "imagenet/qkformer_10_384.yml", list(map(str, flags))), True)


def test_workers_and_ranks_share_shards(data, monkeypatch):
    """Give each worker a shard, because one without would wait forever."""
    monkeypatch.setattr("os.cpu_count", lambda: 9)
    flags = [*SHARDS, data / "shards", "--workers", 9, "--batch-size", 1]
    cfg = config.load(ROOT / "imagenet/qkformer_10_384.yml", list(map(str, flags)))
    stream, alone = create_dataset(cfg, True), world.setup("cpu")
    create = functools.partial(loaders.create_loader, cfg, alone, stream, True, None, (0, 0, 0), (1, 1, 1))
    stream.reader.dist_num_replicas = 2
    assert create().workers == 4  # of 8
    stream.reader.dist_num_replicas = 9
    with refuses(9, 8):
        create()


@pytest.mark.parametrize(("copy", "count"), [(True, 16), (False, 8)], ids=["too many", "too few"])
def test_a_damaged_shard_is_not_left_out_silently(copy, count, tmp_path):
    root = shards(tmp_path / "shards", test=9)
    shard, last = (root / f"tiny-validation-{number}.tar" for number in ("0000", "0001"))
    last.write_bytes(shard.read_bytes() if copy else b"no archive")
    data = load(*SHARDS, root, "--workers", 0, *IMAGENET[2:], train=False)
    with refuses(count, 9):
        list(data.test)


def test_ranks_share_the_batches_of_a_stream(data):
    flags = [*SHARDS, data / "shards", *IMAGENET[2:], "--workers", 1, "--eval-batch-size", 4]
    alone, *shares = (
        list(load(*flags, train=False, rank=rank, world_size=count).test) for rank, count in ((0, 1), (0, 2), (1, 2))
    )
    assert sum(len(labels) for _, labels in alone) == 37
    assert sum(map(len, shares)) == len(alone)
    for i, batch in enumerate(alone):
        assert all(torch.equal(*pair) for pair in zip(batch, shares[i % 2][i // 2], strict=True))


def move(source, target):
    """Return a damage that moves a folder or a file."""
    return lambda root: (root / source).rename(root / target)


def flat(root):
    for path in list((root / "val").glob("*/*")):
        path.rename(root / "val" / path.name)
    for folder in (path for path in (root / "val").iterdir() if path.is_dir()):
        folder.rmdir()


def empty_class(root):
    for path in (root / "val/n00000002").iterdir():
        path.unlink()


def test_one_class_is_refused(tmp_path):
    root = image_folder(tmp_path / "data", classes=1, train=2, test=2, size=8)
    flags = [*IMAGENET, "--batch-size", "2", "--num-classes", "1", "--data-path", str(root)]
    with refuses(root):
        run.create_data(config.load(ROOT / "imagenet/qkformer_10_384.yml", flags), world.setup("cpu"))


def test_other_names_of_classes_are_reported(warnings):
    warn_of_other_classes(["a", "b"], {"classes": ["a", "b"]}, "best.pt")
    warn_of_other_classes(["a", "b"], {}, "best.pt")
    warn_of_other_classes(["tench, Tinca tinca"], {"classes": ["tench"]}, "best.pt")
    warn_of_other_classes(["0", "1"], {"classes": ["tench", "goldfish"]}, "best.pt")
    assert not warnings
    warn_of_other_classes(["b", "zebra"], {"classes": ["b", "horse"]}, "best.pt")
    named(*warnings, "best.pt", "'horse'", "'zebra'")


@pytest.mark.parametrize(
    ("damage", "flags", "value"),
    [
        (None, ["--data-path", "no/where"], "no/where"),
        (None, ["--num-classes", "1000"], "--num-classes"),
        (None, ["--in-channels", "2", "--mean", "0,0", "--std", "1,1"], "in_channels"),
        (None, ["--in-channels", "1"], "mean"),
        (None, ["--split-seed", "1"], "split_seed"),
        (None, ["--sensor-size", "9", "9"], "sensor_size"),
        (None, ["--dataset", "imagenet"], "imagefolder"),
        (None, ["--dataset", "cifar10dvs", "--in-channels", "2"], "cifar10-dvs"),
        (None, ["--dataset", "tfds/x"], "tfds/x"),
        (None, ["--dataset", "wds/x"], "wds/x"),
        (move("train", "training"), [], "/data"),
        (move("val", "elsewhere"), [], "/data"),
        (flat, [], "/data/val"),
        (empty_class, [], "n00000002"),
        (move("val/n00000002", "n2"), [], "n00000002"),
        (move("val/n00000002", "val/n00000009"), [], "n00000002"),
    ],
)
def test_a_broken_folder_is_refused(damage, flags, value, tmp_path):
    root = image_folder(tmp_path / "data", train=2, test=2)
    if damage:
        damage(root)
    with refuses(value):
        load(*IMAGENET, "--batch-size", 2, "--data-path", root, *flags)


def test_an_altered_file_of_cifar_is_refused_and_not_unpickled(tmp_path, monkeypatch):
    train = functools.partial(load_data, "cifar10/cifar10.yml", "--data-path", tmp_path)
    with refuses(tmp_path):
        train()
    with monkeypatch.context() as offline, refuses("division by zero"):  # why it cannot be fetched
        offline.setattr(urllib.request, "urlopen", lambda *args, **kwargs: 1 / 0)
        train("--download")
    cifar(tmp_path, 10)
    unpickled, read = [], pickle.load
    monkeypatch.setattr(pickle, "load", lambda file, **how: unpickled.append(Path(file.name).name) or read(file, **how))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in tmp_path.glob("*/*")}
    kind = torchvision.datasets.CIFAR10
    for altered in (None, "data_batch_3", "test_batch", "batches.meta"):
        known = sums | {altered: 32 * "0"}
        for name in ("train_list", "test_list"):
            monkeypatch.setattr(kind, name, [[file, known[file]] for file, _ in getattr(kind, name)])
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": known["batches.meta"]})
        unpickled.clear()
        with refuses(tmp_path, "--download") if altered else contextlib.nullcontext():
            assert len(train().train.dataset) == 150
        assert altered not in unpickled


def test_an_image_is_read_in_the_mode_of_the_network(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").mode == "RGB"
    assert read_image(tmp_path / "a.png", "L").mode == "L"
    flags = "--in-channels 1 --mean 0.3 --std 0.2 --input-size 4".split()
    cfg = config.load(ROOT / "imagenet/qkformer_10_384.yml", flags)
    assert image.read_tensor(tmp_path / "a.png", cfg).shape == (1, 4, 4)


RAMP = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_16_bit_images_are_scaled_and_not_clipped(name, mode, tmp_path):
    Image.fromarray(RAMP).save(tmp_path / name)
    values = np.asarray(read_image(tmp_path / name, mode))
    assert np.array_equal(values if mode == "L" else values[..., 1], RAMP // 256)


@pytest.mark.parametrize(("name", "dtype"), [("a.tif", np.float32), ("a.pfm", np.float32), ("b.tif", np.int32)])
def test_images_without_a_range_are_refused(name, dtype, tmp_path):
    Image.fromarray((RAMP / 65535).astype(dtype)).save(tmp_path / name)
    with refuses(tmp_path / name):
        read_image(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_images_of_other_libraries_are_scaled_too(dtype, tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(RAMP.astype(dtype)).save(file, "TIFF")
    file.seek(0)
    monkeypatch.setattr(timm.data.dataset, "create_reader", lambda *args, **kwargs: [(file, 0)])
    flags = "--dataset hfds/x --in-channels 1 --mean 0 --std 1 --input-size 8 --workers 0 --eval-batch-size 1"
    with contextlib.nullcontext() if dtype == np.uint16 else refuses("hfds/x"):
        (images, _), *_ = load(*flags.split(), "--crop-pct", 1, train=False).test
        assert torch.equal((images[0, 0] * 255).round(), torch.from_numpy(RAMP // 256).float())


def test_files_of_systems_are_passed_over_and_images_of_other_formats_counted(tmp_path, warnings):
    root = image_folder(tmp_path / "data", train=4, test=4)
    before = training_set(*IMAGENET[:2], "--data-path", root)
    for junk in ("._x.png", ".ipynb_checkpoints/x.png", "__MACOSX/x.png", "n00000001/._1_0.JPEG",
                 "n00000001/.ipynb_checkpoints/1_0.JPEG", ".DS_Store"):  # fmt: skip
        path = root / "train" / junk
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"junk")
    for other in ("n00000000/a.gif", "n00000001/b.AVIF", "n00000001/c.heic"):
        (root / "train" / other).write_bytes(b"")
    after = training_set(*IMAGENET[:2], "--data-path", root)
    assert (after.samples, after.classes) == (before.samples, before.classes)
    (line,) = warnings
    named(line, root / "train", 3)


def test_large_photographs_are_read_without_a_warning(data, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").size == (8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    loaded = load(*SHARDS, data / "shards", *IMAGENET[2:], "--workers", 0, train=False)
    assert sum(len(labels) for _, labels in loaded.test) == 37
    assert not [warning for warning in recwarn if warning.category is Image.DecompressionBombWarning]


QUICK = ("qkformer_10_384", "cifar10")
RECIPES = sorted(path for name in ("imagenet", "cifar10", "cifar100") for path in ROOT.glob(f"{name}/*.yml"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in RECIPES],
)
def test_every_recipe_trains(path, data, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    name = path.parent.name
    flags = ["--input-size", "16" if name.startswith("cifar") else "32", "--time-steps", "1", "--workers", "0"]
    flags += ["--num-classes", "4"] if name == "imagenet" else []
    cfg = config.load(path, [*flags, "--batch-size", "40", "--data-path", str(data / name), "--accum-iter", "1"])
    cfg = dataclasses.replace(cfg, warmup_epochs=0)  # starts at a rate of 0
    where = world.setup("cpu")
    model, loaded = build_model(cfg), create_data(cfg, where)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = Trainer(cfg, where, model, create_optimizer(cfg, model), loaded)
    assert math.isfinite(trainer.train_epoch())
    assert len(loaded.train) == (1 if name == "imagenet" else 2)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("name", ["digits", "imagenet", "cifar10"])  # one channel, without mixup, mixup in the loader
def test_batches_equal_those_of_timms_own_tensors(name, data, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    flags = ["--num-classes", "4"] if name == "imagenet" else []
    cfg = next(config.load(path, flags) for path in sorted((ROOT / name).glob("*.yml")))
    root = None if name == "digits" else str(data / name)
    cfg = dataclasses.replace(cfg, data_path=root, workers=0, batch_size=16, input_size=32)

    def batches(last):
        monkeypatch.setattr(image, "ToNumpy", last)
        loaded = create_data(cfg, world.setup("cpu"))
        timm.utils.random_seed(0)
        loaders = (itertools.islice(loader, 5) for loader in (loaded.train.batches(0), loaded.test))
        return [tensor for loader in loaders for batch in loader for tensor in batch]

    pairs = list(zip(batches(ToNumpy), batches(MaybePILToTensor), strict=True))
    assert len(pairs) > 8
    assert all(torch.equal(a, b) for a, b in pairs)
