"""Counts of faults, processes that die at a chosen point, and bitwise comparison, for the fault tests."""

import contextlib
import dataclasses
import io
import math
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from unittest import mock

import torch
from scripts import ROOT

from engine.cli import UserError

QUICK = "--batch-size 359 --time-steps 1 --mlp-ratio 1 --device cpu".split()  # 4 steps an epoch on the digits
LONGEST_LINE = 2000  # characters of an error message


@dataclasses.dataclass
class Counts:
    """What a part of the tests saw; all but the trials must stay 0."""

    trials: int = 0
    kills: int = 0
    lost: int = 0  # weights that were there before
    tracebacks: int = 0
    wrong: int = 0  # results, messages and exit codes
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
    def trial(self, what: str) -> Iterator[None]:
        """Run a trial in this process: it may end well or in a `UserError` of one short line."""
        self.trials += 1
        try:
            yield
        except UserError as error:
            self.require(0 < len(str(error)) < LONGEST_LINE, f"{what}: a line of {len(str(error))} characters")
        except Exception as error:
            self.count("tracebacks", f"{what}: {type(error).__name__}: {error}")

    def script(self, name: str, *arguments: object, expected: set[int]) -> str:
        """Run a script in this process; return its output."""
        self.trials += 1
        words = [name, *map(str, arguments)]
        output = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
        code = 0
        with (
            mock.patch.object(sys, "argv", words),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            try:
                if name.endswith(".py"):
                    runpy.run_path(str(ROOT / name), run_name="__main__")
                else:
                    sys.modules.pop(name, None)  # runpy warns about a module that is imported already
                    runpy.run_module(name, run_name="__main__")
            except SystemExit as end:
                code = end.code
            except Exception:
                code = 1
                traceback.print_exc()
        text = output.buffer.getvalue().decode()
        self.judge(f"{words}"[:500], code, text, expected)
        return text

    def judge(self, what: str, code: int, output: str, expected: set[int]) -> None:
        """Require an exit code among `expected`, no traceback, and one short line of error with exit code 2."""
        if "Traceback" in output:
            return self.count("tracebacks", f"{what}: {output[-1500:]}")
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        is_told = len(errors) == 1 and len(errors[0]) < LONGEST_LINE if code == 2 else not errors
        return self.require(
            code in expected and is_told, f"{what}: exit code {code}, expected {expected}: {output[-1500:]}"
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
    """Before a script: let it kill itself at the `at`-th step of saving.

    Opening, syncing, renaming, linking and removing are one step each. With a `size`, it dies when the `at`-th file
    that it opens for a checkpoint has that many bytes.
    """

    at: int
    size: int | None = None

    def __call__(self) -> None:
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1
            if steps == self.at and self.size is None:
                os.kill(os.getpid(), signal.SIGKILL)
            elif steps == self.at:  # the kernel kills whoever writes more
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))

        def hook(event: str, arguments: tuple) -> None:
            if event not in ("open", "os.rename", "os.link", "os.remove"):
                return
            if ".pt" not in os.path.basename(str(arguments[0])):
                return
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
            if writes or (event != "open" and self.size is None):
                step()

        sys.addaudithook(hook)
        if self.size is None:
            fsync = os.fsync

            def counted(file) -> None:
                path = os.readlink(f"/proc/self/fd/{file}")
                if ".pt" in os.path.basename(path) or os.path.isdir(path):  # of the records there are others
                    step()
                fsync(file)

            os.fsync = counted


def die_after(cpu_seconds: float) -> None:
    """Before a script: let the kernel kill it after so many seconds of its own CPU time, at any instruction."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
