"""Runs on the digits that the fault tests resume and compare with."""

import functools

import pytest
from chains import run_whole
from harness import QUICK, script


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return the folder of a finished run of two epochs; tests must not write to it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    script("digits/train.py", *QUICK, "--epochs", 2, "--ema-decay", 0.9, "--output-dir", folder, expected={0})
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Return {number of ranks: folder of an uninterrupted run}."""
    folder = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda count: run_whole(folder / str(count), count))
