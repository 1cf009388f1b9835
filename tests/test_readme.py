"""What the README tells people to type works."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from models import create_model, list_models

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_readme_has_commands():
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("make test")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_commands_run_in_order(tmp_path):
    """Each as it stands, but for a shorter training, in a folder of its own."""
    commands = [c for c in COMMANDS if not c.startswith("make ")]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command)
        launcher = ["-m", "torch.distributed.run", "--standalone"] if words[0] == "torchrun" else []
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words[script] = str(ROOT / words[script])
        short = ["--epochs", "1", "--batch-size", "128", "--time-steps", "1"] if "train.py" in words[script] else []
        words = [sys.executable, *launcher, *words[1:], *short]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # two processes need two GPUs, or none
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, command + result.stderr
        assert "top-1" in result.stdout
    assert (tmp_path / "output/first/learning_curve.png").exists()
    assert len(list((tmp_path / "output/digits").iterdir())) == 2  # the runs without --output-dir


@pytest.mark.parametrize("code", PYTHON)
def test_python_examples_run(code):
    namespace = {}
    exec(code, namespace)
    assert namespace["logits"].shape == (2, 100)


def test_every_network_is_in_the_table():
    for name in list_models():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        assert f"{sum(p.numel() for p in create_model(name).parameters()):,}" in row
