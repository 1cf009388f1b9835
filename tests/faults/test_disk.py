"""Disks that fill up while a run writes: one line of error, an intact older checkpoint, and resuming with space."""

import contextlib
import resource
import shutil
import subprocess

import pytest
from chains import Chain, content
from harness import QUICK, script
from scripts import AtStep, Gate, same

KILO = 1024
ENOUGH = 100_000  # KiB


def mount(folder, kilobytes, *options):
    words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kilobytes}k", *options]), "tmpfs", folder]
    return subprocess.run(words, capture_output=True, text=True)


@contextlib.contextmanager
def disk(folder, kilobytes):
    """Mount a file system of this size in `folder`, which needs root."""
    folder.mkdir()
    made = mount(folder, kilobytes)
    if made.returncode:
        pytest.skip(f"cannot mount a file system: {made.stderr.strip()}")
    yield
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 12, 100, 300, *range(600, 8000, 600)])
def test_a_disk_of_any_size(size, tmp_path, whole):
    chain = Chain(tmp_path / "run", whole(1))
    with disk(chain.folder, size):
        chain.life(expected=(0, 2))  # 0 where it was enough
        mount(chain.folder, ENOUGH, "remount")
        chain.finish()


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 4, 8, 16, 700, 1600, 2400, 3200, 4800])
def test_a_disk_that_fills_up_after_a_save(left, tmp_path, whole):
    """Fill the disk before metrics, TensorBoard's events and pictures; `left` is in KiB."""
    chain, gate = Chain(tmp_path / "run", whole(1)), Gate()

    def fill():
        assert gate.is_reached()
        mount(chain.folder, shutil.disk_usage(chain.folder).used // KILO + left, "remount")
        gate.open()

    with disk(chain.folder, ENOUGH):
        chain.life(AtStep(gate.wait, 3), end=fill, expected=(0, 2))
        mount(chain.folder, ENOUGH, "remount")
        chain.finish()


@contextlib.contextmanager
def largest_file(size):
    """Limit the files of this process to `size` bytes, which needs no root and gives another error (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "size", [1_000_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 100, 3_000, 30_000))]
)
def test_files_that_cannot_grow(size, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    flags = [*QUICK, "--epochs", 3, "--output-dir", tmp_path / "run", "--resume", "auto"]
    with largest_file(size):
        script("digits/train.py", *flags, expected={2})
    assert same(content(tmp_path / "run"), content(finished))
    script("digits/train.py", *flags, expected={0})
    assert content(tmp_path / "run")["epoch"] == 3
