"""Checkpoints with bits flipped, blocks lost and tails cut: what is read is what was written, or nothing."""

import argparse
import random
import shutil

import pytest
import torch
from harness import part, same

from engine import checkpoint
from engine.cli import UserError
from models import create_model
from models.released import to_released


def released(kind):
    """The content of a file in the format of a released training, with the smallest of its networks."""
    torch.manual_seed(0)
    weights = to_released(create_model("qkformer_3_64", in_channels=1, mlp_ratio=1))
    args = argparse.Namespace(model="qkformer", lr=1e-3, mean=(0.1, 0.2), resume=None, amp=True)
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.rand(64)}},
        "param_groups": [{"params": [0]}],
    }
    return {
        "imagenet": {"model": weights, "optimizer": optimizer, "epoch": 199, "args": args},
        "cifar": {"epoch": 400, "arch": "QKFormer", "state_dict": weights, "optimizer": optimizer, "args": args},
        "dvs": {"model": weights, "optimizer": optimizer, "epoch": 90, "args": args, "max_test_acc1": 84.1},
        "weights": weights,
    }[kind]


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """A sound safetensors file."""
    path = tmp_path_factory.mktemp("sound") / "ours.safetensors"
    with part("setup") as counts:
        flags = ["--checkpoint", finished / "last.pt", "--format", "safetensors", "--output", path]
        counts.script("analysis.export", *flags, expected={0})
    return path


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory):
    """Name -> path of a sound file of each format."""
    folder = tmp_path_factory.mktemp("sound")
    found = {"ours": finished / "last.pt"}
    for kind in ("imagenet", "cifar", "dvs", "weights"):
        found[kind] = folder / f"{kind}.pth"
        torch.save(released(kind), found[kind])
    return found


def flip(content, rng):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_many(content, rng):
    for _ in range(20):
        flip(content, rng)


def flip_in_directory(content, rng):
    """Where a zip file says what it holds: its last part."""
    at = len(content) - 1 - rng.randrange(min(20_000, len(content)))
    content[at] ^= 1 << rng.randrange(8)


def flip_in_header(content, rng):
    content[rng.randrange(4000)] ^= 1 << rng.randrange(8)


def zero(content, rng, size=512):
    at = rng.randrange(len(content) - size) // size * size
    content[at : at + size] = bytes(size)


def swap(content, rng, size=512):
    blocks = (len(content) // size) - 1
    a, b = (rng.randrange(blocks) * size for _ in range(2))
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]


def truncate(content, rng):
    del content[rng.choice([rng.randrange(len(content)), len(content) - 1 - rng.randrange(200), rng.randrange(200)]) :]


def append(content, rng):
    content += rng.randbytes(rng.choice([1, 22, 512, 70_000]))


def repeat(content, rng):
    """A second copy behind the first, cut: its directory is another."""
    content += content[: rng.randrange(len(content))]


def remove(content, rng):
    at = rng.randrange(len(content))
    del content[at : at + rng.choice([1, 64, 4096])]


MUTATIONS = [flip, flip_many, flip_in_directory, flip_in_header, zero, swap, truncate, append, repeat, remove]


def mutated(content, rng, count):
    """(what was done, the content after it) of `count` mutations of all kinds."""
    for i in range(count):
        result, mutate = bytearray(content), MUTATIONS[i % len(MUTATIONS)]
        mutate(result, rng)
        yield f"mutation {i} ({mutate.__name__})", result


def full(short, full):
    return pytest.mark.parametrize("count", [short, pytest.param(full, marks=pytest.mark.slow)])


def read_all(path, name, count, tmp_path):
    sound = checkpoint.read(path)
    with part("mutated checkpoints") as counts:
        for what, content in mutated(path.read_bytes(), random.Random(name), count):
            (tmp_path / name).write_bytes(content)
            with counts.trial(f"{name}, {what}"):
                read = checkpoint.read(tmp_path / name)
                counts.require(same(read, sound), f"{name}, {what}: other content was read")


@full(20, 200)
@pytest.mark.parametrize("kind", ["ours", "imagenet", "cifar", "dvs", "weights"])
def test_zip_files(files, kind, count, tmp_path):
    read_all(files[kind], f"{kind}.pt", count, tmp_path)


@full(20, 200)
def test_safetensors(exported, count, tmp_path):
    read_all(exported, "ours.safetensors", count, tmp_path)


def is_readable(path):
    try:
        return bool(checkpoint.read(path))
    except UserError:
        return False


@full(2, 20)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(finished, count, tmp_path):
    whole = checkpoint.read(finished / "last.pt")
    with part("runs with a damaged last.pt") as counts:
        for what, content in mutated((finished / "last.pt").read_bytes(), random.Random(1), count):
            folder = tmp_path / what
            shutil.copytree(finished, folder)
            (folder / "last.pt").write_bytes(content)
            is_damaged = not is_readable(folder / "last.pt")
            output = counts.script("digits/train.py", "--output-dir", folder, "--resume", "auto", expected={0})
            read = checkpoint.read(folder / "last.pt")
            is_same = all(same(read[key], whole[key]) for key in ("state_dict", "state_dict_ema", "optimizer", "best"))
            counts.require(is_same, f"{what}: the weights are others than without the damage")
            counts.require((folder / "last.pt.damaged").exists() == is_damaged, f"{what}: {output}")
