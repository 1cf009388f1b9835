"""Checkpoints with bits flipped, blocks lost and tails cut: what is read is what was written, or nothing."""

import argparse
import random

import pytest
import torch
from harness import part, same

from engine import checkpoint
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
def files(finished, tmp_path_factory):
    """Name -> path of a sound file of each format."""
    folder = tmp_path_factory.mktemp("sound")
    found = {"ours": finished / "last.pt"}
    for kind in ("imagenet", "cifar", "dvs", "weights"):
        found[kind] = folder / f"{kind}.pth"
        torch.save(released(kind), found[kind])
    return found


def flip(content, rng, count=1):
    for _ in range(count):
        at = rng.randrange(len(content))
        content[at] ^= 1 << rng.randrange(8)


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


MUTATIONS = [
    flip, lambda content, rng: flip(content, rng, 20), flip_in_directory, flip_in_header, zero, swap, truncate, append,
    repeat, remove,
]  # fmt: skip


@pytest.mark.parametrize("count", [40, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["ours", "imagenet", "cifar", "dvs", "weights"])
def test_zip_files(files, kind, count, tmp_path):
    sound, content, rng = checkpoint.read(files[kind]), files[kind].read_bytes(), random.Random(kind)
    with part("mutated checkpoints") as counts:
        for i in range(count):
            mutated = bytearray(content)
            mutate = MUTATIONS[i % len(MUTATIONS)]
            mutate(mutated, rng)
            (tmp_path / "file.pt").write_bytes(mutated)
            what = f"{kind}, mutation {i} ({mutate.__name__})"
            with counts.trial(what):
                counts.require(same(checkpoint.read(tmp_path / "file.pt"), sound), f"{what}: other content was read")
