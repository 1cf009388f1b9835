"""How tests run the scripts: as a user does, in a process of their own, or in this one where only a line is wanted."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # what is compared bit by bit, is so there


def run(*command, cwd=ROOT, **environment):
    environment = {**CPU, **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def succeed(*command, **kwargs):
    result = run(*command, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def here(monkeypatch, capfd, script, *arguments):
    """Run a script, or a module as `python -m` does, in this process, which saves its start; returns what it says."""
    own = ["--device", "cpu"] if script.endswith(".py") else []
    monkeypatch.setattr(sys, "argv", [script, *own, *map(str, arguments)])
    capfd.readouterr()
    threads = torch.get_num_threads()
    _execute(monkeypatch, script)
    torch.set_num_threads(threads)
    return capfd.readouterr().out


def _execute(monkeypatch, script):
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        monkeypatch.delitem(sys.modules, script, raising=False)  # runpy warns of a module that is imported already
        runpy.run_module(script, run_name="__main__")


def result_in(folder):
    """What test.py wrote to `folder`."""
    (path,) = folder.glob("*.test.json")
    return json.loads(path.read_text())


def fail(monkeypatch, capfd, script, *arguments):
    """Run a script, or a module as `python -m` does, in this process, which saves its start; returns its one line."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        _execute(monkeypatch, script)
    assert end.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert not [line for line in lines[:-1] if line.startswith(("error: ", "Traceback"))]
    return lines[-1]
