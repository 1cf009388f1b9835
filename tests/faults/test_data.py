"""Data sets and records of runs with every kind of damage: one line of error, or no effect on results."""

import itertools
import shutil

import numpy as np
import pytest
import tiny_data
from harness import SLOW, script
from scripts import rows_in, same

from engine import checkpoint

SMALL = "--epochs 1 --warmup-epochs 0 --batch-size 4 --time-steps 2 --mlp-ratio 1 --device cpu --threads 1".split()
IMAGES = [*SMALL, *"--in-channels 3 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --input-size 16".split()]


def first(folder, pattern):
    return min(folder.glob(pattern))


def replaced(pattern, change):
    """Return a damage to the first file of a pattern: `change` maps its content to another."""

    def damage(root):
        path = first(root, pattern)
        path.write_bytes(change(path.read_bytes()))

    return damage


def removed(pattern):
    def damage(root):
        path = first(root, pattern)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return damage


def dangling(root):
    path = first(root, "train/*/*.JPEG")
    path.unlink()
    path.symlink_to(root / "nowhere")


OTHER_BYTES = {
    "zero bytes": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "text": lambda content: b"<html>quota exceeded</html>",
    "noise": lambda content: np.random.default_rng(0).bytes(len(content)),
    "zeros": lambda content: bytes(len(content)),
}
IMAGE_DAMAGES = {
    "sound": lambda root: None,  # control: only the damage may cause errors
    **{f"{split}: {what}": replaced(f"{split}/*/*.JPEG", change)
       for what, change in OTHER_BYTES.items() for split in ("train", "val")},
    "no class in train": removed("train/n*"),
    "no class in val": removed("val/n*"),
    "no val": removed("val"),
    "no train": removed("train"),
    "an empty class": lambda root: (root / "train/n99999999").mkdir(),
    "a dangling link": dangling,
}  # fmt: skip
QUICK = ("sound", "val: text", "no class in val")


@pytest.mark.parametrize("what", [pytest.param(w, marks=() if w in QUICK else SLOW) for w in IMAGE_DAMAGES])
def test_folders_of_images(what, tmp_path):
    root = tiny_data.image_folder(tmp_path / "data", train=4, test=3, size=16)
    IMAGE_DAMAGES[what](root)
    flags = ["--dataset", "imagefolder", "--data-path", root, "--num-classes", 4, "--workers", len(what) % 2]
    code = 0 if what == "sound" else 2
    output = script("digits/train.py", *IMAGES, *flags, "--output-dir", root / "run", expected={code})
    assert code == 0 or str(root) in output.splitlines()[-1], output[-300:]


NOT_THESE_WORDS = {
    "nothing": b"", "half": b"{", "an empty list": b"[]", "an empty object": b"{}", "null": b"null", "a number": b"3",
    "a text": b'"x"', "numbers": b"[1, 2]", "not UTF-8": b"\xff\xfe\x00", "zeros": bytes(500), "deep": b"[" * 100_000,
    "enormous": b"9" * 5000, "infinite": b"[1e999]", "nan": b"NaN", "lists": b"[[], []]", "objects": b"[{}, {}]",
    "other types": b'{"train": 1, "test": {"a": []}}', "other entries": b'{"train": [1], "test": [null]}',
    "a row of texts": b'{"epoch": "x", "test_top1": "y", "lr": null}\n', "an empty row": b"{}\n", "a list": b"[]\n",
    "an infinite row": b'{"epoch": 0, "lr": 1e999, "train_loss": NaN, "test_loss": 1, "test_top1": -Infinity}\n',
    "a nested row": b'{"epoch": 0, "lr": [], "train_loss": {}, "test_loss": 1, "test_top1": true}\n',
    "a row without figures": b'{"epoch": 0}\n',
    "a huge epoch": b'{"epoch": -1e300, "lr": 1, "train_loss": 1, "test_loss": 1, "test_top1": 1}\n',
}  # fmt: skip


@pytest.mark.parametrize("of", [13, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize("name", ["split.json", "run.json", "metrics.jsonl", "config.yml"])
def test_records_of_a_run(name, of, finished, tmp_path):
    weights = checkpoint.read(finished / "last.pt")
    for what, words in itertools.islice(NOT_THESE_WORDS.items(), 0, None, of):
        folder = tmp_path / what
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("tensorboard"))
        (folder / name).write_bytes(words)
        config = ["--config", folder / name] if name == "config.yml" else []
        resume = ["--output-dir", folder, "--resume", "auto", *config]
        said = script("digits/train.py", *resume, expected={0, 2})
        mentioned = "error: " not in said or str(folder / name) in said.splitlines()[-1]
        assert mentioned, f"{name}, {what}: not named: {said[-300:]}"
        script("digits/test.py", "--checkpoint", folder / "last.pt", *config, expected={0, 2})
        assert same(checkpoint.read(folder / "last.pt"), weights), f"{name}, {what}: other weights"


def test_a_loss_that_is_no_number(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    flags = ["--epochs", 3, "--weight-decay", 1e38, "--lr", 1000, "--resume", "auto", "--output-dir"]
    script("digits/train.py", *flags, tmp_path / "run", expected={2})
    before, after = (checkpoint.read(folder / "last.pt") for folder in (finished, tmp_path / "run"))
    assert same(before, after)
    assert [row["epoch"] for row in rows_in(tmp_path / "run")] == [0, 1]
