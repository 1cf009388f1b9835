"""How a script ends: what the user can mend is told in one line."""

import sys
import time
from collections.abc import Callable

import torch

from . import dist
from .errors import Stopped, UserError
from .log import logger


def guard(body: Callable[[], None]) -> None:
    """Run a script's body: what the user can mend ends in one line and exit code 2."""
    try:
        body()
        dist.teardown()
    except UserError as error:
        _exit(str(error))
    except Stopped as error:
        logger.info(str(error))
        sys.exit(error.code)
    except KeyboardInterrupt:
        print(
            "interrupted; what was done stays: start again, or go on with a run by --resume auto",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(130)
    except (OSError, MemoryError, RuntimeError) as error:
        message = _explained(error)
        if message is None:
            raise
        _exit(message)


def _explained(error: OSError | MemoryError | RuntimeError) -> str | None:
    """What happened to the machine, and what to do; None if `error` is a mistake of ours."""
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU's memory is full: use a smaller --batch-size, or --grad-checkpointing ({first_line})"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return f"the memory is full: use a smaller --batch-size, or fewer --workers ({first_line or 'MemoryError'})"
    if "DataLoader worker" in str(error):
        return (
            f"a loader's process has ended ({first_line}): killed for want of memory, or of shared memory? Use fewer "
            "--workers; --resume auto goes on from what was saved last"
        )
    if dist.is_lost_peer(error):
        return (
            f"lost the other processes ({first_line}); if one of them has ended, see its own message; "
            "--resume auto goes on from what was saved last"
        )
    return None


def _exit(message: str) -> None:
    if dist.local_rank():
        time.sleep(3)  # most mistakes are every process's: the launcher ends the others once the first has told
    line = "".join(sign if sign.isprintable() else "?" for sign in " ".join(message.split()))  # names of files hold any
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)
