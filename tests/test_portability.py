"""Scripts on a platform without POSIX, simulated by removing its parts from Python."""

import json
import os
import subprocess
import sys

import pytest
from scripts import FIXED, ROOT

from engine import checkpoint

# runs at the start of each process; torch is first, because it registers at fork everywhere but on Windows
WITHOUT_POSIX = """
import multiprocessing.context, os, signal, sys, torch
sys.modules["fcntl"] = None
del signal.SIGHUP, os.fork, os.register_at_fork, os.setpgrp
for method in ("fork", "forkserver"):
    del multiprocessing.context._concrete_contexts[method]
multiprocessing.set_start_method("spawn", force=True)
"""


@pytest.mark.parametrize("script", ["digits/train.py", pytest.param("digits-dvs/train.py", marks=pytest.mark.slow)])
def test_runs_train_and_resume_without_posix(script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_POSIX)
    environment = {**os.environ, **FIXED, "PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    flags = "--batch-size 240 --time-steps 1 --warmup-epochs 0 --resume auto --output-dir".split()
    for epochs, workers in ((1, 1), (2, 0)):
        command = [sys.executable, script, *flags, tmp_path / "run", f"--epochs={epochs}", f"--workers={workers}"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
    assert checkpoint.read(tmp_path / "run/last.pt")["epoch"] == 2
    starts = json.loads((tmp_path / "run/run.json").read_text())
    assert [start["first_epoch"] for start in starts] == [0, 1]
