"""Output: lines and a progress bar, files written whole, records, and provenance."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path

from tqdm import tqdm

from .cli import UserError

logger = logging.getLogger("qkformer")
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "timm", "spikingjelly", "numpy")


def setup_console(is_main: bool) -> None:
    """Print the lines of `engine` and `models` on stdout, from the main rank only."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.raiseExceptions = False  # a run continues without a reader of its output
    for source in (logger, logging.getLogger("models")):
        source.handlers = [handler]
        source.propagate = False
        source.setLevel(logging.INFO if is_main else logging.ERROR)


def progress(
    loader: Iterable, what: str, interval: int, show: bool, status=dict, total: int | None = None, done: int = 0
) -> Iterator:
    """Yield from `loader` with a bar on a terminal, else with a line every `interval` steps; both show `status()`.

    The steps are `total`, by default the loader's, and `done` come before those of `loader`.
    """
    total = len(loader) if total is None else total
    bar = tqdm(loader, desc=what, total=total, initial=done, leave=False, disable=not show or not sys.stderr.isatty())
    start = time.monotonic()
    for step, batch in enumerate(bar, done + 1):
        yield batch
        if show and step % interval == 0:
            if not bar.disable:
                bar.set_postfix(status())
            elif step < total:
                left = (time.monotonic() - start) / (step - done) * (total - step)
                values = "".join(f", {key} {value}" for key, value in status().items())
                logger.info(f"{what}: step {step}/{total}{values}, {left:.0f} s left")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a crash leaves the old file or the new one."""
    temporary = Path(f"{path}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_record(path: Path, default: object, parse: Callable[[str], object]) -> object:
    """Return `parse` of a record's text, or `default` if there is none; raise `UserError` if it is damaged."""
    try:
        return parse(path.read_text()) if path.exists() else default
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{path}: damaged; move it away to continue without this record") from None


def label(name: str, most: int = 15) -> str:
    """Return a name for a picture, cut to `most` characters, with no formula in it."""
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")


def provenance() -> dict:
    """Return git commit ("+changes" if files other than records differ), versions of packages, command and time."""
    changes = _git("status", "--porcelain", "--", ".", ":!docs/results", ":!benchmarks/results")
    return {
        "git_commit": _git("rev-parse", "HEAD") + "+changes" * bool(changes),
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {d.name: d.version for d in distributions() if d.name in PACKAGES},
    }


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""
