"""Start and end of a script: user errors, exit codes, signals; flags are in config.py.

Light to import, because it guards the other imports.
"""

import contextlib
import errno
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
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
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
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 100, 100


class Stopped(Exception):
    """The end of a run that a signal asked for, after saving.

    Args:
        number: the signal; the exit code is 128 + `number`, as a shell reports it.
        where: position in the run.
    """

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
    _open_closed_streams()
    threading.excepthook = _ignore_os_errors
    try:
        yield
    except (UserError, Stopped) as error:
        _exit(str(error), error.code)
    except KeyboardInterrupt:
        _exit(f"interrupted; {RESUME}", 130)
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        message = _explanation(error)
        if message is None:
            raise
        _exit(message, UserError.code)
    finally:
        _flush()


def _open_closed_streams() -> None:
    """Keep output out of the next file that is opened, which gets the number of a closed stream."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, it stays open


def _ignore_os_errors(error: threading.ExceptHookArgs) -> None:
    """Print errors of threads, but for TensorBoard's failures to write, which it raises in the main thread too."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def _flush() -> None:
    """Flush stdout; its reader may be gone (`| head`), which Python would report at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explanation(error: Exception) -> str | None:
    """Explain a failure of the machine or the installation; None for a bug of this project."""
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, ImportError):
        is_ours = (error.name or "").split(".")[0] in ("engine", "models", "analysis", "benchmarks")
        return None if is_ours else f"import: {first_line}; pip install -r requirements.txt"
    if isinstance(error, OSError):
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return f"{error.strerror}: raise the limit (ulimit -n), or use fewer --workers"
        if error.errno in FULL:
            return f"{error.filename or 'disk'}: {error.strerror}; make room, and {RESUME}"
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return f"GPU memory: full ({first_line}); use a smaller --batch-size, or --grad-checkpointing"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"memory: full ({first_line or 'MemoryError'}); use a smaller --batch-size, or fewer --workers"
    if "DataLoader worker" in str(error):
        return f"{first_line}: often out of memory or shared memory; use fewer --workers, and {RESUME}"
    return None


def _exit(message: str, code: int) -> None:
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if code != UserError.code:  # a signal, which all ranks got
        if local_rank == "0":
            print(message, file=sys.stderr, flush=True)
        sys.exit(code)
    if local_rank != "0":
        time.sleep(3)  # most errors are the same on all ranks, and a launcher ends the others after the first
    line = "".join(sign if sign.isprintable() else "?" for sign in " ".join(message.split()))  # file names hold any
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


class StopRequest:
    """Context that keeps the first of `SIGNALS` in `signal`; a later SIGINT interrupts the program at once.

    `Trainer.stop_if_asked` acts on it. Signals that are ignored before (SIGHUP under nohup) stay ignored.
    """

    def __init__(self):
        self.signal: int | None = None
        self._handlers = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:  # the user is in a hurry; some launchers send SIGTERM twice
            raise KeyboardInterrupt


@functools.cache
def spare_children() -> None:
    """Put each forked process, such as a DataLoader worker, in a process group of its own from its first moment.

    A signal from a terminal or a launcher goes to a whole group; a worker that it ended would take the run with it.
    """
    if hasattr(os, "fork"):
        os.register_at_fork(after_in_child=os.setpgrp)
