"""What the fault tests share: what is counted, child processes that die on command, and what is compared.

Starting Python with torch takes seconds, so children are forked from a server that has imported all they need. Each
has a session of its own and runs a script as a user would, its output in a file.
"""

import contextlib
import dataclasses
import io
import math
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import torch

from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = ["harness", "engine.run", "analysis.energy", "sklearn.datasets", "sklearn.model_selection"]
QUICK = "--batch-size 359 --time-steps 1 --mlp-ratio 1 --device cpu".split()  # 4 steps an epoch on the digits
LONGEST_LINE = 2000  # characters of an error message
PATIENCE = 120  # seconds after which a child hangs


@dataclasses.dataclass
class Counts:
    """What a part of the tests saw; all but the trials must stay 0."""

    trials: int = 0
    kills: int = 0
    lost: int = 0  # weights that were there before
    tracebacks: int = 0
    wrong: int = 0  # results, messages and exit codes
    hangs: int = 0
    seconds: float = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def count(self, kind: str, note: str) -> None:
        """One more of `kind`; the note is shown if the part fails."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.notes.append(f"{kind}: {note}"[:3000])

    def add(self, other: "Counts") -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def require(self, truth: bool, note: str, kind: str = "wrong") -> None:
        if not truth:
            self.count(kind, note)

    @contextlib.contextmanager
    def trial(self, what: str, limit: float = 20) -> Iterator[None]:
        """A trial in this process: it may end well or in a `UserError` of one line that is not too long."""
        self.trials += 1
        try:
            with time_limit(limit):
                yield
        except UserError as error:
            self.require(0 < len(str(error)) < LONGEST_LINE, f"{what}: a line of {len(str(error))} characters")
        except Hang:
            self.count("hangs", f"{what}: after {limit} s")
        except Exception as error:
            self.count("tracebacks", f"{what}: {type(error).__name__}: {error}")

    def script(self, name: str, *arguments: object, expected: set[int], limit: float = PATIENCE) -> str:
        """A trial of a script in this process; returns what it says."""
        self.trials += 1
        words = [name, *map(str, arguments)]
        said = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
        with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                with time_limit(limit):
                    if name.endswith(".py"):
                        runpy.run_path(str(ROOT / name), run_name="__main__")
                    else:
                        sys.modules.pop(name, None)  # runpy warns of a module that is imported already
                        runpy.run_module(name, run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code
            except Hang:
                code = None
            except Exception:
                code = traceback.print_exc()
        output = said.buffer.getvalue().decode()
        self.judge(f"{words}"[:500], code, output, expected)
        return output

    def judge(self, what: str, code: int | None, output: str, expected: set[int]) -> None:
        """How a script ended: with an exit code of those `expected`, no traceback, and behind 2 one line that says why.

        Without an exit code it hangs, unless a traceback tells otherwise.
        """
        if "Traceback" in output:
            return self.count("tracebacks", f"{what}: {output[-1500:]}")
        if code is None:
            return self.count("hangs", what)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        said = len(errors) == 1 and len(errors[0]) < LONGEST_LINE if code == 2 else not errors
        return self.require(
            code in expected and said, f"{what}: exit code {code}, expected {expected}: {output[-1500:]}"
        )

    def __add__(self, other: "Counts") -> "Counts":
        names = [field.name for field in dataclasses.fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


PARTS: dict[str, Counts] = {}  # for the table


@contextlib.contextmanager
def part(name: str) -> Iterator[Counts]:
    """Counts of a test of one part, which must hold nothing but trials in the end."""
    counts, start = Counts(), time.monotonic()
    try:
        yield counts
    finally:
        counts.seconds = time.monotonic() - start
        PARTS[name] = PARTS.get(name, Counts()) + counts
    assert not counts.notes, f"{len(counts.notes)} faults\n" + "\n".join(counts.notes[:10])


class Hang(BaseException):
    """Time is up; no `except Exception` swallows it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def ring(*_):
        raise Hang

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def same(a: object, b: object) -> bool:
    """Whether two contents of a checkpoint are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@dataclasses.dataclass(frozen=True)
class Death:
    """When a child kills itself, counted from its start.

    At its `at`-th step of saving, of which opening, syncing, renaming, linking and removing are one each; or, with a
    `size`, when the `at`-th file that it opens for a checkpoint has that many bytes.
    """

    at: int
    size: int | None = None


class Child:
    """A script in a process of its own, as one of `ranks` or alone."""

    def __init__(self, script: str, *arguments: object, log: Path, death: Death | None = None, **environment: str):
        self.log = log
        words = [script, *map(str, arguments)]
        self.process = _server().Process(target=_run, args=(words, log, death, environment))
        self.process.start()

    def signal(self, number: int) -> None:
        """To the process and those of its group, as a terminal does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self, limit: float = PATIENCE) -> int | None:
        """The exit code (negative: the signal that killed it), None after `limit` seconds. Nothing is left behind."""
        self.process.join(limit)
        code = self.process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        return code

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, sign: Callable[[], bool], limit: float = PATIENCE) -> bool:
        """Wait until `sign()`; False if the child ended before, or time is up."""
        end = time.monotonic() + limit
        while not sign():
            if not self.process.is_alive() or time.monotonic() > end:
                return sign()
            time.sleep(0.01)
        return True


def ranks(count: int, *words: object, log: Path, death: Death | None = None) -> list[Child]:
    """A script in `count` processes, as a launcher starts them; the first of them is the one to die."""
    if count == 1:
        return [Child(*words, log=log, death=death)]
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = str(server.getsockname()[1])
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    return [
        Child(*words, log=log.with_suffix(f".{i}"), death=None if i else death, RANK=str(i), LOCAL_RANK=str(i), **world)
        for i in range(count)
    ]


def _server():
    """A context whose processes are forked from one that has imported what is slow to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/faults"))),
        "OMP_NUM_THREADS": "1",  # what is compared bit by bit, is so there
        "CUDA_VISIBLE_DEVICES": "",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    multiprocessing.forkserver.ensure_running()
    for key, value in before.items():
        if value is None:
            del os.environ[key]
        else:
            os.environ[key] = value
    return context


def _run(words: list[str], log: Path, death: Death | None, environment: dict[str, str]) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # of the loaders, as it is where there is no server
    torch.set_num_threads(1)
    if death:
        _await(death)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _await(death: Death) -> None:
    """Count the steps of saving from now on, and die at the one that is meant."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == death.at and death.size is None:
            os.kill(os.getpid(), signal.SIGKILL)
        elif steps == death.at:  # the kernel kills whoever writes more
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (death.size, resource.RLIM_INFINITY))

    def hook(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.link", "os.remove"):
            return
        if ".pt" not in os.path.basename(str(arguments[0])):
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
        if writes or (event != "open" and death.size is None):
            step()

    sys.addaudithook(hook)
    if death.size is None:
        fsync = os.fsync

        def counted(file) -> None:
            path = os.readlink(f"/proc/self/fd/{file}")
            if ".pt" in os.path.basename(path) or os.path.isdir(path):  # of the records there are others
                step()
            fsync(file)

        os.fsync = counted
