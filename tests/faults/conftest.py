"""Runs on the digits from which the fault tests start, and with which they compare."""

import functools

import pytest
from chains import run_whole
from harness import QUICK, script


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder of a finished run of two epochs; not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    script("digits/train.py", *QUICK, "--epochs", 2, "--ema-decay", 0.9, "--output-dir", folder, expected={0})
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Number of processes -> folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda count: run_whole(folder / str(count), count))
