"""Disks that fill up while a run writes: one line, the checkpoint before stays, and with space the run goes on."""

import contextlib
import random
import resource
import shutil
import subprocess

import pytest
from chains import Chain, content
from harness import QUICK, part, same

KILO = 1024
ENOUGH = 100_000  # KiB


def mount(folder, kilobytes, *options):
    words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kilobytes}k", *options]), "tmpfs", folder]
    return subprocess.run(words, capture_output=True, text=True)


@contextlib.contextmanager
def disk(folder, kilobytes):
    """A file system of that size in `folder`; mounting one needs root."""
    folder.mkdir()
    made = mount(folder, kilobytes)
    if made.returncode:
        pytest.skip(f"cannot mount a file system: {made.stderr.strip()}")
    yield
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill_and_go_on(chain, size, left=None):
    """A life on a disk of `size` KiB, or with `left` KiB more than its first save takes; then one with space enough."""

    def end(children):
        if left is not None:
            children[0].wait_for((chain.folder / "last.pt").exists)
            mount(chain.folder, shutil.disk_usage(chain.folder).used // KILO + left, "remount")

    with disk(chain.folder, size):
        chain.life(end=end, expected=(0, 2))  # 0 where it was enough
        mount(chain.folder, ENOUGH, "remount")
        chain.finish()


@pytest.mark.slow
def test_disks_of_all_sizes(tmp_path, whole):
    """From too small for the first file of a run to almost large enough."""
    with part("full disks") as counts:
        for size in [4, 8, 12, 40, 100, 300, *range(600, 8000, 300)]:
            fill_and_go_on(Chain(counts, tmp_path / f"{size}k", whole(1)), size)


@pytest.mark.slow
def test_disks_that_fill_up_behind_a_save(tmp_path, whole):
    """So that it is the turn of the metrics, TensorBoard's events and the pictures."""
    rng = random.Random(0)
    with part("full disks") as counts:
        for number in range(24):
            left = rng.choice([0, 4, 8, 16, 1600, 3200, rng.randrange(6000)])
            fill_and_go_on(Chain(counts, tmp_path / f"left{number}", whole(1)), ENOUGH, left)


@contextlib.contextmanager
def largest_file(size):
    """Without root: no file of this process may grow beyond `size` bytes, which is an error of its own (EFBIG)."""
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
    with part("files that cannot grow") as counts:
        with largest_file(size):
            counts.script("digits/train.py", *flags, expected={2})
        counts.require(same(content(tmp_path / "run"), content(finished)), "the checkpoint before is gone", "lost")
        counts.script("digits/train.py", *flags, expected={0})
        counts.require(content(tmp_path / "run")["epoch"] == 3, "it did not go on")
