"""Checkpoints with flipped bits, lost blocks and cut tails: reading gives the written content or an error."""

import argparse
import itertools
import random
import shutil
from functools import partial

import pytest
import torch
from harness import repeated, script, trial
from scripts import same

from engine import checkpoint
from engine.cli import UserError
from models import create_model
from models.released import to_released


def released_training():
    """Return the content of a file of a released training, with the smallest network."""
    torch.manual_seed(0)
    args = argparse.Namespace(model="qkformer", lr=1e-3, mean=(0.1, 0.2), resume=None, amp=True)
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.rand(64)}}
    optimizer = {"state": state, "param_groups": [{"params": [0]}]}
    weights = to_released(create_model("qkformer_3_64", in_channels=1, mlp_ratio=1))
    return {"model": weights, "optimizer": optimizer, "epoch": 199, "args": args}


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory):
    """Return {name: path} of an intact file of each format with checksums."""
    folder = tmp_path_factory.mktemp("sound")
    paths, content = {"ours": finished / "last.pt"}, released_training()
    for kind, part in (("imagenet", content), ("weights", content["model"])):
        paths[kind] = folder / f"{kind}.pth"
        torch.save(part, paths[kind])
    return paths


def flip(content, rng, count=1, part=slice(None)):
    for _ in range(count):
        content[rng.choice(range(len(content))[part])] ^= 1 << rng.randrange(8)


def zero(content, rng, size=512):
    at = rng.randrange(len(content) - size) // size * size
    content[at : at + size] = bytes(size)


def swap(content, rng, size=512):
    blocks = (len(content) // size) - 1
    a, b = (rng.randrange(blocks) * size for _ in range(2))
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]


def truncate(content, rng):
    del content[rng.choice([rng.randrange(len(content)), len(content) - 1 - rng.randrange(200), rng.randrange(200)]) :]


def remove(content, rng):
    at = rng.randrange(len(content))
    del content[at : at + rng.choice([1, 64, 4096])]


MUTATIONS = {
    "flip": flip,
    "flip many": partial(flip, count=20),
    "flip in the directory": partial(flip, part=slice(-20_000, None)),  # the last part of a zip file
    "flip in the header": partial(flip, part=slice(4000)),
    "zero": zero,
    "swap": swap,
    "truncate": truncate,
    "append": lambda content, rng: content.extend(rng.randbytes(rng.choice([1, 22, 512, 70_000]))),
    "repeat": lambda content, rng: content.extend(content[: rng.randrange(len(content))]),
    "remove": remove,
}


def mutated(content, rng, count):
    """Yield (mutation, content after it) for `count` mutations of all kinds."""
    for number, (name, mutate) in zip(range(count), itertools.cycle(MUTATIONS.items()), strict=False):
        result = bytearray(content)
        mutate(result, rng)
        yield f"{name} {number}", result


@repeated(20, 100)
@pytest.mark.parametrize("kind", ["ours", "imagenet", "weights"])
def test_reading(files, kind, count, tmp_path):
    sound, path = checkpoint.read(files[kind]), tmp_path / files[kind].name
    for what, content in mutated(files[kind].read_bytes(), random.Random(kind), count):
        path.write_bytes(content)
        with trial(f"{kind}, {what}"):
            assert same(checkpoint.read(path), sound)


def is_readable(path):
    try:
        return bool(checkpoint.read(path))
    except UserError:
        return False


@repeated(2, 10)
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(finished, count, tmp_path):
    whole = checkpoint.read(finished / "last.pt")
    for what, content in mutated((finished / "last.pt").read_bytes(), random.Random(1), count):
        folder = tmp_path / what
        shutil.copytree(finished, folder)
        (folder / "last.pt").write_bytes(content)
        is_damaged = not is_readable(folder / "last.pt")
        script("digits/train.py", "--output-dir", folder, "--resume", "auto", expected={0})
        read = checkpoint.read(folder / "last.pt")
        for key in ("state_dict", "state_dict_ema", "optimizer", "best"):
            assert same(read[key], whole[key]), f"{what}: {key}"
        assert (folder / "last.pt.damaged").exists() == is_damaged, what


def test_the_newest_undamaged_checkpoint_is_taken(finished, tmp_path):
    """Rename damaged checkpoints; if all are damaged, do not start from scratch."""
    for names, code in ((("last.pt", "last-1.pt"), 0), (("last.pt", "last-1.pt", "best.pt"), 2)):
        folder = tmp_path / str(code)
        shutil.copytree(finished, folder)
        for name in names:
            (folder / name).write_bytes((folder / name).read_bytes()[:-1000])
        output = script("digits/train.py", "--output-dir", folder, "--resume", "auto", expected={code})
        assert code == 0 or str(folder) in output
        assert all((folder / f"{name}.damaged").exists() for name in names)
