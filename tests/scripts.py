"""Run the scripts as a user does.

Python needs seconds to import torch, so most runs are forks of a server process that has imported the libraries; each
test process has its own server. Launchers start new interpreters, as does `fresh=True`.
"""

import atexit
import contextlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from engine import config, world
from engine.cli import UserError
from engine.run import create_data

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = ["scripts", "engine.run", "analysis.energy", "sklearn.datasets", "sklearn.model_selection"]
FIXED = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # results are equal bit by bit
    "LOKY_MAX_CPU_COUNT": "1",  # recordings are prepared without further interpreters
}


class Child:
    """Script, or a module after "-m", in a fork of the server with its own session.

    The file `log` gets its output, but stderr goes to `errors` if given. It calls `before`, which must be picklable.
    """

    def __init__(self, *command, log, errors=None, cwd=ROOT, before=None, **environment):
        self.log = Path(log)
        words = [str(word) for word in command]
        environment = {**os.environ, **FIXED, **environment}
        arguments = (words, self.log, errors or self.log, cwd, before, environment)
        self.process = _server().Process(target=_run, args=arguments)
        self.process.start()

    def wait(self) -> int:
        """Return the exit code (negative: the signal that killed it); end all processes of the session."""
        try:
            self.process.join()
            return self.process.exitcode
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _server():
    """Return a context whose processes are forks of one that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    settings = {**FIXED, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/faults")))}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        multiprocessing.forkserver.ensure_running()
    return context


def _run(words, log, errors, cwd, before, environment):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    for number, path in ((1, log), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # the loaders' default without a server
    paths = [path for path in sys.path if path and not Path(path).is_relative_to(ROOT / "tests")]
    if words[0] == "-m":
        sys.path[:] = [str(cwd), *paths]
        words = words[1:]
    else:
        words[0] = str(Path(cwd, words[0]))
        sys.path[:] = [os.path.dirname(words[0]), *paths]
    try:
        if before:
            before()
        execute(*words)
    finally:
        atexit._run_exitfuncs()


@dataclass(frozen=True)
class AtStep:
    """Function to run before a script: it calls `act` after the optimizer's n-th step."""

    act: Callable[[], None]
    step: int

    def __call__(self) -> None:
        steps = itertools.count(1)

        def after_step(*_) -> None:
            if next(steps) == self.step:
                self.act()

        register_optimizer_step_post_hook(after_step)


def signal_at_step(number: int, step: int) -> AtStep:
    """Return a function to run before a script, which signals its group after the optimizer's n-th step."""
    return AtStep(partial(os.killpg, 0, number), step)


class Gate:
    """Gate where a child waits until the test opens it: `before=AtStep(gate.wait, 1)`."""

    def __init__(self):
        self.outside, self.inside = multiprocessing.Pipe()

    def __getstate__(self):
        return {"inside": self.inside}  # all that the child needs

    def wait(self) -> None:
        """Wait for `open`; runs in the child."""
        self.inside.send(None)
        self.inside.recv()

    def is_reached(self) -> bool:
        """Block until the child waits; return False if it ends first. Call it after the child's start."""
        self.inside.close()
        try:
            self.outside.recv()
        except (EOFError, ConnectionResetError):
            return False
        return True

    def open(self) -> None:
        self.outside.send(None)


def run(*command, cwd=ROOT, fresh=False, before=None, **environment) -> subprocess.CompletedProcess:
    """Run a script, a module after "-m", or code after "-c"."""
    words = [str(word) for word in command]
    if fresh or words[0] == "-c" or (words[0] == "-m" and words[1].startswith("torch.")):
        environment = {**os.environ, **FIXED, **environment}
        return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder, "stdout"), Path(folder, "stderr")
        code = Child(*words, log=log, errors=errors, cwd=cwd, before=before, **environment).wait()
        return subprocess.CompletedProcess(words, code, log.read_text(), errors.read_text())


def succeed(*command, **kwargs) -> str:
    """Run as `run` does; return stdout."""
    result = run(*command, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def ranks(count, *words, log, before=None, only=None):
    """Start a script in `count` processes, as a launcher does; `before` is for all, or for the rank `only`."""
    if count == 1:
        return [Child(*words, log=log, before=before)]
    port = str(free_port())
    return [
        Child(
            *words,
            log=log.with_suffix(f".{rank}"),
            before=before if only in (None, rank) else None,
            WORLD_SIZE=str(count),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="localhost",
            MASTER_PORT=port,
        )
        for rank in range(count)
    ]


def named(line, *values) -> str:
    """Assert that an error's line contains every value; return the line."""
    for value in values:
        assert str(value) in line, f"{value!r} is missing in {line!r}"
    return line


@contextlib.contextmanager
def refuses(*values):
    """Assert that the body raises an error of one line that contains every value."""
    with pytest.raises((UserError, ValueError)) as error:
        yield error
    assert "\n" not in str(error.value)
    named(str(error.value), *values)


def execute(script, *arguments):
    """Run a script, or a module as `python -m` does, in this process, where patches count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            patch.delitem(sys.modules, script, raising=False)  # runpy warns about a module that is imported already
            runpy.run_module(script, run_name="__main__", alter_sys=True)


def here(monkeypatch, capfd, script, *arguments):
    """Run as `execute` does, on the CPU; return stdout."""
    capfd.readouterr()
    threads = torch.get_num_threads()
    execute(script, *(["--device", "cpu"] if script.endswith(".py") else []), *arguments)
    torch.set_num_threads(threads)
    return capfd.readouterr().out


def fail(monkeypatch, capfd, script, *arguments):
    """Run as `execute` does; assert exit code 2 and one error, and return its line."""
    with pytest.raises(SystemExit) as end:
        execute(script, *arguments)
    assert end.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert not [line for line in lines[:-1] if line.startswith(("error: ", "Traceback"))]
    return lines[-1]


def load_data(recipe, *flags, train=True, rank=0, world_size=1):
    """Return the data of a recipe as one of several ranks gets them, on the CPU."""
    cfg = config.load(ROOT / recipe, list(map(str, flags)))
    return create_data(cfg, world.World(rank, world_size, torch.device("cpu")), train)


def result_in(folder):
    """Return what test.py wrote to `folder`."""
    (path,) = folder.glob("*.test.json")
    return json.loads(path.read_text())


def rows_in(folder, *without):
    """Return the rows of a run's metrics, without some of the columns."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


def same(a: object, b: object) -> bool:
    """Return True if two contents of a checkpoint are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))  # NaN


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
