"""Start and end of a script: user errors, exit codes, signals. It guards the other imports, so it has few."""

import contextlib
import functools
import os
import reprlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType

LONGEST = 1000  # characters of a message; a value in it may have any length
RESUME = "--resume auto continues from the last save"
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class UserError(Exception):
    """Bad input. Its message is one line `thing: problem; fix`, which a script prints before it exits with `code`."""

    code = 2

    def __init__(self, message: str):
        # a DataLoader passes on the error of a worker with the worker's traceback in front
        line = " ".join(message.split(f"{type(self).__name__}: ")[-1].split())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 + 5 :]}")


def short(value: object) -> str:
    """Return the `repr` of a value, cut if it is long."""
    form = reprlib.Repr()
    form.maxlevel, form.maxstring, form.maxother = 2, 100, 100
    return form.repr(value)


class Stopped(Exception):
    """End of a run after a signal, with everything saved; the exit code is 128 + `number`, as in a shell."""

    def __init__(self, number: int, where: str):
        self.code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name} {where}; {RESUME}")


def main(function: str, script: str, recipe: str, *names: str) -> None:
    """Run a script: call `function` ("module:name") on the recipe next to `script`, importing it under `guard`."""
    with guard():
        resolve_name(function)(Path(script).resolve().with_name(recipe), *names)


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Print errors that the user can fix as one line, and exit with their code."""
    threading.excepthook = _print_bugs
    try:
        yield
    except (UserError, Stopped) as error:
        _exit(str(error), error.code)
    except KeyboardInterrupt:
        _exit(f"interrupted; {RESUME}", 130)
    except (OSError, MemoryError, RuntimeError) as error:
        if (message := _explanation(error)) is None:
            raise
        _exit(message, UserError.code)


def _print_bugs(error: threading.ExceptHookArgs) -> None:
    """Print errors of threads, but not TensorBoard's failures to write, which it raises in the main thread too."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def _explanation(error: Exception) -> str | None:
    """Explain a failure of the machine; None for a bug of this project."""
    first_line = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else first_line
    if is_out_of_memory(error):
        return f"memory: full ({first_line}); use a smaller --batch-size, --grad-checkpointing, or fewer --workers"
    if "DataLoader worker" in first_line:
        return f"{first_line}: often out of memory or shared memory; use fewer --workers, and {RESUME}"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Return True if memory is full, of the machine or the GPU; torch raises several kinds of errors."""
    signs = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _exit(message: str, code: int) -> None:
    """Print a line on stderr and exit; after a signal, which all ranks get, one rank prints."""
    is_error, is_first = code == UserError.code, os.environ.get("LOCAL_RANK", "0") == "0"
    if is_error and not is_first:
        time.sleep(3)  # the launcher ends this rank after the same error of the first
    if is_error or is_first:
        line = "".join(sign if sign.isprintable() else "?" for sign in " ".join(message.split()))  # file names hold any
        print("error: " * is_error + line, file=sys.stderr, flush=True)
    sys.exit(code)


class StopRequest:
    """Context that keeps the first of `SIGNALS` in `signal`; a later SIGINT interrupts the program at once."""

    def __init__(self):
        self.signal: int | None = None
        self._handlers = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP under nohup
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:  # not SIGTERM, which some launchers send twice
            raise KeyboardInterrupt


@functools.cache
def spare_children() -> None:
    """Put each forked process in a group of its own, because a signal to a group would end workers too early."""
    if hasattr(os, "fork"):
        os.register_at_fork(after_in_child=os.setpgrp)
