"""Scripts in this process, checks of how they end, and processes that die at a chosen point."""

import contextlib
import dataclasses
import io
import os
import resource
import signal
import sys
import traceback
from collections.abc import Collection, Iterator

import pytest
from scripts import execute

from engine.cli import UserError

QUICK = "--batch-size 359 --time-steps 1 --mlp-ratio 1 --device cpu".split()  # 4 steps an epoch on the digits
LONGEST_LINE = 2000  # characters of an error message
SLOW = pytest.mark.slow


def repeated(short, full):
    """Parametrize `count`: few examples, and all of them with `-m slow`."""
    return pytest.mark.parametrize("count", [short, pytest.param(full, marks=SLOW)])


def script(name: str, *arguments: object, expected: Collection[int]) -> str:
    """Run a script, or a module, in this process; assert that it ends well and return its output."""
    output = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
    code = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            execute(name, *arguments)
        except SystemExit as end:
            code = end.code
        except Exception:
            code = 1
            traceback.print_exc()
    text = output.buffer.getvalue().decode()
    judge(f"{name} {arguments}"[:500], code, text, expected)
    return text


def judge(what: str, code: int, output: str, expected: Collection[int]) -> None:
    """Assert an exit code among `expected`, no traceback, and one short line of error with exit code 2 alone."""
    shown = f"{what}: exit code {code}, expected {expected}: {output[-1500:]}"
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code in expected, shown
    assert "Traceback" not in output, shown
    assert len(errors) == (code == 2), shown
    assert all(len(line) < LONGEST_LINE for line in errors), shown


@contextlib.contextmanager
def trial(what: str) -> Iterator[None]:
    """Assert that the body ends well or in a `UserError` of one short line."""
    line = "nothing is wrong"
    try:
        yield
    except UserError as error:
        line = str(error)
    except Exception as error:
        error.add_note(what)
        raise
    assert 0 < len(line) < LONGEST_LINE, what


@dataclasses.dataclass(frozen=True)
class Death:
    """Function that kills a script when its `at`-th checkpoint has `size` bytes, or at its `at`-th renaming."""

    at: int
    size: int | None = None

    def __call__(self) -> None:
        left = self.at

        def hook(event: str, arguments: tuple) -> None:
            nonlocal left
            is_save = event == "os.rename" if self.size is None else event == "open" and arguments[1] == "wb"
            if not is_save or ".pt" not in os.path.basename(str(arguments[0])):
                return
            left -= 1
            if left == 0 and self.size is None:
                os.kill(os.getpid(), signal.SIGKILL)
            elif left == 0:  # the kernel kills a process that writes more
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))

        sys.addaudithook(hook)


def die_after(cpu_seconds: float) -> None:
    """Return a function that has the kernel kill a script after some seconds of CPU time, at any instruction."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
