"""The table of what the fault tests counted, and with the full version a file of it."""

import dataclasses
import functools
import json

import pytest
from chains import run_whole
from harness import PARTS, QUICK, Counts, part
from scripts import ROOT
from tabulate import tabulate

COLUMNS = ("trials", "kills", "lost", "tracebacks", "wrong", "seconds")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run of two epochs on the digits; not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with part("setup") as counts:
        flags = [*QUICK, "--epochs", 2, "--ema-decay", 0.9, "--output-dir", folder]
        counts.script("digits/train.py", *flags, expected={0})
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Number of processes -> a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda count: run_whole(folder / str(count), count))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take over what a process of pytest-xdist has counted."""
    for name, counts in getattr(node, "workeroutput", {}).get("faults", {}).items():
        PARTS.setdefault(name, Counts()).add(Counts(**counts))


def pytest_terminal_summary(terminalreporter):
    if not PARTS:
        return
    rows = [[name, *(getattr(counts, key) for key in COLUMNS)] for name, counts in sorted(PARTS.items())]
    terminalreporter.section("faults")
    terminalreporter.write_line(tabulate(rows, ["part", *COLUMNS], floatfmt=".0f"))


def pytest_sessionfinish(session):
    counts = {name: dataclasses.asdict(counts) for name, counts in PARTS.items()}
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = counts
    elif counts and session.config.option.markexpr == "slow":
        path = ROOT / "output" / "faults.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(counts, indent=2))
