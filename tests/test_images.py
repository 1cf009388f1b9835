"""The scripts of ImageNet and CIFAR as a user runs them, on tiny data in the true formats."""

import dataclasses
import io
import itertools
import math
import os
import tarfile
import urllib.request

import pytest
import timm.utils
import torch
import torchvision.datasets.cifar
from PIL import Image
from scripts import ROOT, TORCHRUN, fail, named, ranks, refuses, result_in, succeed
from scripts import rows_in as rows
from timm.data.transforms import MaybePILToTensor, ToNumpy
from tiny_data import cifar, image_folder, shards

from engine import checkpoint, config, world
from engine.data import image
from engine.data.datasets import create_dataset
from engine.data.image import create_data
from engine.optim import create_optimizer
from engine.run import build_model
from engine.trainer import Trainer
from models import create_model

LAUNCHERS = {
    "python": [],
    "launch": ["-m", "torch.distributed.launch", "--standalone", "--nproc_per_node=2"],
    "torchrun": TORCHRUN,
}
EASY = "--hflip 0 --aa none --reprob 0 --smoothing 0 --mixup 0 --lr 1e-3 --accum-iter 1".split()
SMALL = "--time-steps 1 --batch-size 8 --workers 1 --warmup-epochs 0 --cooldown-epochs 0".split()
IMAGENET = "--num-classes 4 --input-size 32".split()
SHARDS = "--dataset wds/tiny --num-classes 4 --data-path".split()
CIFAR = "--input-size 8".split()


def command(name, launcher="python", script="train.py"):
    """The words in front of the flags; CIFAR's script runs with torchvision's check of the md5 switched off."""
    patched = ["tests/tiny_data.py"] if name.startswith("cifar") else []
    return [*LAUNCHERS[launcher], *patched, f"{name}/{script}"]


@pytest.mark.parametrize(
    ("name", "launcher", "flags"),
    [
        pytest.param("imagenet", "python", IMAGENET, marks=pytest.mark.slow),
        pytest.param("imagenet", "launch", IMAGENET, marks=pytest.mark.slow),
        pytest.param("imagenet", "torchrun", IMAGENET, marks=pytest.mark.slow),
        ("cifar10", "torchrun", CIFAR),
        pytest.param("cifar100", "python", CIFAR, marks=pytest.mark.slow),
    ],
)
def test_train_resume_test(data, tmp_path, name, launcher, flags):
    """The loss falls, and the evaluation is the same to the last digit, however many processes share it."""
    where = ["--data-path", data / name, "--workers", "1", "--output-dir"]
    train = command(name, launcher)
    succeed(*train, *SMALL, *EASY, *flags, "--epochs", "2", *where, tmp_path / "run")
    processes = 1 if launcher == "python" else 2
    assert checkpoint.read(tmp_path / "run/last.pt")["position"]["order"]["world_size"] == processes
    resume = [*command(name), *where, tmp_path / "run", "--resume", "auto", "--epochs", "3"]
    children = ranks(processes, *resume, log=tmp_path / "log")
    assert [child.wait() for child in children] == [0] * processes, children[0].output
    losses = [row["train_loss"] for row in rows(tmp_path / "run")]
    assert len(losses) == 3
    assert losses[-1] < 0.95 * losses[0]
    results = []
    for count in (1, 2):
        test = [*command(name, script="test.py"), "--checkpoint", tmp_path / "run/last.pt", "--eval-batch-size", "4"]
        children = ranks(count, *test, *where, tmp_path / str(count), log=tmp_path / f"log{count}")
        assert [child.wait() for child in children] == [0] * count, children[0].output
        results.append(result_in(tmp_path / str(count)))
    for key in ("loss", "top1", "top5", "count"):
        assert results[0][key] == results[-1][key]
    assert results[0]["count"] == (37 if name == "imagenet" else 21)  # neither is a multiple of 2 x 4
    assert (tmp_path / "1/last.predictions.png").exists()


@pytest.mark.slow
def test_shards_train_and_evaluate_as_folders_do(data, tmp_path):
    flags = [*SMALL, *IMAGENET, "--dataset", "wds/tiny", "--data-path", data / "shards"]
    succeed(*command("imagenet", "torchrun"), *flags, "--epochs", "1", "--output-dir", tmp_path)
    losses = []
    for launcher in ("python", "torchrun"):
        test = command("imagenet", launcher, "test.py")
        succeed(*test, *flags, "--eval-batch-size", "4", "--checkpoint", tmp_path / "last.pt")
        assert result_in(tmp_path)["count"] == 37
        losses.append(result_in(tmp_path)["loss"])
    assert losses[0] == losses[1]


def test_more_processes_than_shards_are_refused(data, monkeypatch, capfd):
    """Else one of them would have nothing to train on, and the others wait for it."""
    stream = create_dataset(config.load(ROOT / "imagenet/qkformer_10_384.yml", [*SHARDS, str(data / "shards")]), True)
    assert image._feedable(stream, 10, 2) == 4  # 8 shards
    assert image._feedable(stream, 3, 2) == 3
    with refuses(9, 8):
        image._feedable(stream, 1, 9)


def test_a_damaged_shard_is_not_left_out_silently(tmp_path, data, monkeypatch, capfd):
    torch.save(create_model("qkformer_10_384", num_classes=4).state_dict(), tmp_path / "weights.pt")
    root = shards(tmp_path / "shards", test=9)
    with tarfile.open(root / "tiny-validation-0000.tar", "w") as archive:
        member = tarfile.TarInfo("000000.jpg")
        member.size = 9
        archive.addfile(member, io.BytesIO(b"no image."))
    flags = [*IMAGENET, "--dataset", "wds/tiny", "--data-path", root, "--workers", "0", "--time-steps", "1"]
    line = fail(monkeypatch, capfd, "imagenet/test.py", *flags, "--checkpoint", tmp_path / "weights.pt")
    named(line, "tiny-validation-0000.tar")
    (root / "tiny-validation-0000.tar").write_bytes((root / "tiny-validation-0001.tar").read_bytes())
    line = fail(monkeypatch, capfd, "imagenet/test.py", *flags, "--checkpoint", tmp_path / "weights.pt")
    named(line, 2, 9)


def break_nothing(root):
    pass


def no_train(root):
    (root / "train").rename(root / "training")


def archives(root):
    (root / "val").rename(root / "elsewhere")
    (root / "ILSVRC2012_img_val.tar").touch()


def flat(root):
    for path in list((root / "val").glob("*/*")):
        path.rename(root / "val" / path.name)
    for folder in (root / "val").iterdir():
        if folder.is_dir():
            folder.rmdir()


def empty_class(root):
    for path in (root / "val/n00000002").iterdir():
        path.unlink()


def missing_class(root):
    empty_class(root)
    (root / "val/n00000002").rmdir()


def other_class(root):
    (root / "val/n00000002").rename(root / "val/n00000009")


def truncated(root):
    path = root / "val/n00000001/1_3.JPEG"
    path.write_bytes(path.read_bytes()[:200])


def not_an_image(root):
    (root / "train/n00000001/1_3.JPEG").write_text("<html>")


@pytest.mark.parametrize(
    ("damage", "flags", "value"),
    [
        (break_nothing, ["--data-path", "no/where"], "no/where"),
        (break_nothing, ["--num-classes", "1000"], "--num-classes"),
        (break_nothing, ["--in-channels", "2", "--mean", "0,0", "--std", "1,1"], "in_channels"),
        (break_nothing, ["--dataset", "imagenet"], "imagefolder"),
        (break_nothing, ["--dataset", "wds/x"], "wds/x"),
        (no_train, [], "/data"),
        (archives, [], "/data"),
        (flat, [], "/data/val"),
        (empty_class, [], "n00000002"),
        (missing_class, [], "num_classes"),
        (other_class, [], "n00000002"),
        (truncated, ["--dataset", "torch/folder"], "val/n00000001/1_3.JPEG"),
        (truncated, [], "val/n00000001/1_3.JPEG"),
        (not_an_image, [], "train/n00000001/1_3.JPEG"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_folder_is_named_in_one_line(damage, flags, value, tmp_path, monkeypatch, capfd):
    root = image_folder(tmp_path / "data", train=8)
    damage(root)
    small = [*SMALL, *IMAGENET, "--data-path", root, "--epochs", "1", "--output-dir", tmp_path / "run"]
    assert value in fail(monkeypatch, capfd, "imagenet/train.py", *small, *flags)


def test_broken_cifar_is_named_in_one_line(tmp_path, monkeypatch, capfd):
    named(fail(monkeypatch, capfd, "cifar10/train.py"), "cifar10")
    train = ["cifar10/train.py", "--data-path", tmp_path]
    named(fail(monkeypatch, capfd, *train), "cifar-10-batches-py/data_batch_1", "--download")
    with monkeypatch.context() as offline:
        offline.setattr(urllib.request, "urlopen", lambda *args, **kwargs: 1 / 0)
        assert "division by zero" in fail(offline, capfd, *train, "--download")  # why it cannot be fetched
    cifar(tmp_path, 10)  # not the published files
    named(fail(monkeypatch, capfd, *train), "cifar-10-batches-py/data_batch_1")


def test_an_image_is_read_in_the_mode_of_the_network(tmp_path):
    from engine.data.datasets import read_image

    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").mode == "RGB"
    assert read_image(tmp_path / "a.png", "L").mode == "L"


@pytest.mark.parametrize(
    "path",
    sorted(p for d in ("imagenet", "cifar10", "cifar100") for p in ROOT.glob(f"{d}/*.yml")),
    ids=lambda p: p.stem,
)
def test_every_recipe_trains(path, data, monkeypatch):
    """One update of the recipe's own network with its own optimizer and augmentation, on small images."""
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
    assert math.isfinite(trainer.train_epoch("once"))
    assert len(loaded.train) == (1 if name == "imagenet" else 2)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("name", ["digits", "imagenet", "cifar10"])  # of one channel, unmixed, mixed by the loader
def test_batches_equal_those_of_timms_own_tensors(name, data, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    flags = ["--num-classes", "4"] if name == "imagenet" else []
    cfg = next(config.load(path, flags) for path in sorted((ROOT / name).glob("*.yml")))
    cfg = dataclasses.replace(cfg, data_path=str(data / name), workers=0, batch_size=16, input_size=32)

    def batches(last):
        monkeypatch.setattr(image, "ToNumpy", last)
        loaded = create_data(cfg, world.setup("cpu"))
        timm.utils.random_seed(0)
        loaders = (itertools.islice(loader, 5) for loader in (loaded.train.batches(0), loaded.test))
        return [tensor for loader in loaders for batch in loader for tensor in batch]

    pairs = list(zip(batches(ToNumpy), batches(MaybePILToTensor), strict=True))
    assert len(pairs) > 8
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("flags", "train", "size"),
    [
        pytest.param(
            "--device cpu --input-size 32 --time-steps 1 --batch-size 8 --lif-backend torch",
            25,
            40,
            marks=pytest.mark.slow,
        ),
        pytest.param("--device cuda --batch-size 32 --lif-backend cupy", 200, 256, marks=pytest.mark.gpu),
    ],
    ids=["small", "imagenet"],
)
def test_fifty_steps_lower_the_loss(tmp_path, flags, train, size):
    """10-384 by its recipe but for the data; where there is a GPU at 224 x 224, T = 4, in fp16, with CuPy's neurons."""
    root = image_folder(tmp_path / "data", train=train, test=2, size=size)
    fixed = "--num-classes 4 --epochs 2 --warmup-epochs 0 --accum-iter 1 --lr 3e-4 --workers 4"
    start = ["-m", "torch.distributed.launch", "--standalone", "--nproc_per_node=1", "imagenet/train.py"]
    command = [*start, *fixed.split(), *flags.split(), "--data-path", root, "--output-dir", tmp_path / "run"]
    succeed(*command, CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0") if "cuda" in flags else "")
    first, second = [row["train_loss"] for row in rows(tmp_path / "run")]
    assert second < first
