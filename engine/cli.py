"""How a script ends: user errors, exit codes, and signals. Light to import, because it watches the rest load."""

import contextlib
import errno
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

LONGEST = 1000  # characters of a message; what the user gave may have any length


class UserError(Exception):
    """Bad input. Its message is one line that names the thing and the remedy; scripts print it and exit with 2."""

    def __init__(self, message: str):
        # a loader's worker hands its exception on with the traceback in front
        line = " ".join(message.split(f"{type(self).__name__}: ")[-1].split())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 + 5 :]}")


class Stopped(Exception):
    """A signal asked the run to end, and it is saved.

    Args:
        number: the signal; the script's exit code is 128 + `number`, as the shell's.
        where: how far the run has come.
    """

    def __init__(self, number: int, where: str):
        self.code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name} {where}; --resume auto goes on from there")


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Around a script's body, its imports included: what the user can mend ends in one line and exit code 2."""
    _open_closed_streams()
    threading.excepthook = _in_a_thread
    try:
        yield
        _teardown()
    except UserError as error:
        _exit(str(error))
    except Stopped as error:
        _exit(str(error), error.code)
    except KeyboardInterrupt:
        _exit("interrupted; what was done stays: start again, or go on with a run by --resume auto", 130)
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        message = _explained(error)
        if message is None:
            raise
        _exit(message)
    finally:
        _flush()


def _open_closed_streams() -> None:
    """What is printed shall not end up in a file that has got the number of a closed stream."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, it stays open


def _in_a_thread(error: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises what it cannot write, and TensorBoard again where it is called: once is enough."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def _flush() -> None:
    """Nobody may be reading any more, as behind `| head`: Python would complain of it when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _teardown() -> None:
    from . import world

    world.teardown()


def _explained(error: Exception) -> str | None:
    """What happened to the machine, and what to do; None if `error` is a mistake of ours."""
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, ImportError):
        is_ours = (error.name or "").split(".")[0] in ("engine", "models", "analysis", "benchmarks")
        return None if is_ours else f"a package cannot be loaded ({first_line}): pip install -r requirements.txt"
    if isinstance(error, OSError):
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return f"{error.strerror}: raise the limit (ulimit -n), or use fewer --workers"
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory is full: use a smaller --batch-size, or --grad-checkpointing ({first_line})"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"the memory is full: use a smaller --batch-size, or fewer --workers ({first_line or 'MemoryError'})"
    if "DataLoader worker" in str(error):
        return (
            f"a loader's process has ended ({first_line}): killed for want of memory, or of shared memory? Use fewer "
            "--workers; --resume auto goes on from what was saved last"
        )
    from . import world

    if world.is_lost_peer(error):
        return (
            f"lost the other processes ({first_line}); if one of them has ended, see its own message; "
            "--resume auto goes on from what was saved last"
        )
    return None


def _exit(message: str, code: int = 2) -> None:
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if code != 2:  # a signal's, and all processes got it
        if local_rank == "0":
            print(message, file=sys.stderr, flush=True)
        sys.exit(code)
    if local_rank != "0":
        time.sleep(3)  # most mistakes are every process's: the launcher ends the others once the first has told
    line = "".join(sign if sign.isprintable() else "?" for sign in " ".join(message.split()))  # names of files hold any
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


class StopRequest:
    """As a context, notes the first of these in `signal`; a SIGINT after it ends the program at once.

    What is ignored when the context begins, as SIGHUP under nohup, stays so.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:  # somebody is in a hurry; SIGTERM comes twice from some launchers
            raise KeyboardInterrupt


@functools.cache
def spare_children() -> None:
    """Processes that are forked from now on, loaders', leave the group that a terminal or a launcher sends signals to.

    From their first moment: one that got such a signal while it starts would end, and the run with it.
    """
    os.register_at_fork(after_in_child=os.setpgrp)
