"""Folder of a run: its lock, the checkpoint to resume, and its records."""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from torch.utils.tensorboard import SummaryWriter

from . import checkpoint, log
from . import world as distributed
from .cli import UserError
from .config import Config, plain
from .data.loaders import Data
from .log import logger
from .world import World

SPLIT = "split.json"
_locks = {}  # folder -> its locked file; closing it would unlock it


class Start(NamedTuple):
    """Where a run starts: its folder, and the checkpoint to resume, if any."""

    folder: Path
    path: Path | None
    state: dict  # empty without a checkpoint
    is_native: bool  # a checkpoint of this project
    continues: bool  # in the folder of the checkpoint


def find_run(cfg: Config, world: World) -> Start:
    """Return the folder to write to, locked if it exists, and the checkpoint to resume."""
    folder = Path(cfg.output_dir or runs_of(cfg) / time.strftime("%Y%m%d-%H%M%S"))
    path, state = Path(cfg.resume) if cfg.resume else None, None
    if cfg.resume == "auto" and not cfg.output_dir:
        raise UserError("--resume auto: needs --output-dir, to find the run again")
    if world.is_main:  # other ranks may not see its disk
        claim(folder)
        path, state = newest_checkpoint(folder) if cfg.resume == "auto" else (path, None)
    folder, path = distributed.gather([(folder, path)])[0]
    state = state or (checkpoint.read(path) if path else {})
    is_native, is_released = (state.get("format") == kind for kind in ("qkformer", "imagenet"))
    if path and not (is_native and "optimizer" in state) and not (is_released and isinstance(state.get("epoch"), int)):
        raise UserError(f"--resume {path}: holds no state of a training; use --finetune to start from its weights")
    if is_native and not cfg.output_dir:
        folder = path.parent
    if world.is_main:
        claim(folder)
    newest = next(iter(checkpoint.kept(folder / "last.pt")), None)
    if newest and not (path and path.samefile(newest)):
        raise UserError(f"{folder}: holds a run; use --resume auto, or another --output-dir")
    return Start(folder, path, state, is_native, is_native and folder.resolve() == path.parent.resolve())


def claim(folder: Path) -> None:
    """Lock an existing folder until this process ends; raise `UserError` if another run writes to it."""
    if not folder.exists() or folder.resolve() in _locks:
        return
    file = open(folder / ".lock", "a")  # noqa: SIM115, closing it would unlock it
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not for children, which `flock` and filelock would include
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another run writes to it; use another --output-dir") from None
    except (OSError, ImportError) as error:  # Windows has no fcntl, and some disks have no locks
        logger.warning(f"warning: {folder}: cannot be locked ({error}); start no second run in it")
    _locks[folder.resolve()] = file


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | tuple[None, None]:
    """Return the newest readable checkpoint and its content; damaged files are renamed to *.damaged."""
    candidates = checkpoint.kept(folder / "last.pt") + checkpoint.kept(folder / "best.pt")
    for path in candidates:
        try:
            return path, checkpoint.read(path)
        except UserError as error:
            renamed = path.replace(path.with_name(f"{path.name}.damaged"))
            logger.warning(f"warning: {error}; renamed to {renamed.name}, trying an older one")
    if candidates:
        raise UserError(f"{folder}: no readable checkpoint; start again with --output-dir NEW")
    return None, None


def runs_of(cfg: Config) -> Path:
    """Return the default folder of the runs of a recipe."""
    return Path("output", "-".join(filter(None, (Path(cfg.config).stem, cfg.variant))))


def checkpoint_to_test(cfg: Config) -> Path:
    """Return the checkpoint that the flags name, else `best.pt` of the recipe's last run in its default folder."""
    if path := cfg.checkpoint or cfg.resume or cfg.finetune:
        return Path(path)
    if not (runs := [*runs_of(cfg).glob("best.pt"), *runs_of(cfg).glob("*/best.pt")]):
        raise UserError(f"--checkpoint: missing, and {runs_of(cfg)} holds no best.pt of a run; name a file")
    return max(runs, key=os.path.getmtime)


def _split(text: str) -> dict[str, list[str]]:
    return {part: [*map(os.fspath, json.loads(text)[part])] for part in ("train", "test")}


def _rows(first_epoch: int, text: str) -> list[str]:
    """Return the lines of the epochs before `first_epoch`."""
    lines = [line for line in text.splitlines() if line.endswith("}")]  # a crash may leave half a line
    return [f"{line}\n" for line in lines if json.loads(line)["epoch"] < first_epoch]


def warn_of_seen(data: Data, path: Path) -> None:
    """Warn about test samples that the run of the checkpoint `path` recorded as training samples."""
    trained = log.read_record(path.parent / SPLIT, {"train": []}, _split)["train"]
    if data.split and (seen := set(trained).intersection(data.split["test"])):
        samples = len(data.split["test"])
        logger.warning(f"warning: {path}: trained on {len(seen)} of {samples} test samples; its accuracy is too high")


@contextlib.contextmanager
def records(cfg: Config, world: World, start: Start, data: Data, first_epoch: int) -> Iterator[Callable | None]:
    """Record settings, provenance and data; give the main rank a function that records the row of an epoch."""
    if not world.is_main:
        yield None
        return
    folder = start.folder
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder)
    if start.continues and log.read_record(folder / SPLIT, data.split, _split) != data.split:
        raise UserError(f"{folder / SPLIT}: the data are split otherwise now; use the same --split-seed and data")
    if data.split:
        log.write_whole(folder / SPLIT, json.dumps(data.split, indent=0) + "\n")
    starts = log.read_record(folder / "run.json", [], lambda text: [dict(start) for start in json.loads(text)])
    starts.append({**log.provenance(), "first_epoch": first_epoch, "config": plain(cfg)})
    log.write_whole(folder / "run.json", json.dumps(starts, indent=2) + "\n")
    settings = plain(cfg, without=("config", "variant", "output_dir", "resume", "checkpoint"))
    if cfg.data_path and ":" not in cfg.data_path:
        settings["data_path"] = os.path.abspath(cfg.data_path)  # a YAML's is relative to its folder
    (folder / "config.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
    metrics = folder / "metrics.jsonl"
    log.write_whole(metrics, "".join(log.read_record(metrics, [], functools.partial(_rows, first_epoch))))
    with contextlib.closing(SummaryWriter(folder / "tensorboard", purge_step=first_epoch)) as tensorboard:

        def record(row: dict) -> None:
            with metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for key in row.keys() - {"epoch"}:
                tensorboard.add_scalar(key, row[key], row["epoch"])
            tensorboard.flush()

        yield record
