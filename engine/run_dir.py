"""The folder of a run: which one to go on with, which checkpoint to take, and what is recorded in it."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml

from . import checkpoint, log, world
from .cli import UserError
from .config import FIELDS, LOCAL_FIELDS, Config, load, plain
from .data.loaders import Data
from .log import RunLog, logger
from .trainer import Trainer
from .world import World

SPLIT = "split.json"
LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors of writing, where they name no file
_held = {}  # folder -> its locked file, for as long as this process lives


def find_run(cfg: Config, here: World) -> tuple[Path | None, Path | None, dict | None]:
    """The folder to write to (None: a new one), and the checkpoint to go on from and its content (None: a start)."""
    folder = Path(cfg.output_dir) if cfg.output_dir else None
    if here.is_main and folder and folder.exists():
        with writing_to(folder):
            claim(folder)
    path = world.from_main(_checkpoint_to_resume(cfg, folder) if here.is_main else None)  # others may not see its disk
    state = checkpoint.read(path) if path else None
    if state and state["format"] == "qkformer" and "optimizer" not in state:
        raise UserError(
            f"--resume {path}: holds weights and no optimizer, so there is no run to go on with; --finetune starts a "
            "new one from its weights"
        )
    if state and state["format"] == "qkformer":
        folder = folder or path.parent
        if here.is_main and folder.exists():
            with writing_to(folder):
                claim(folder)
    elif state and (state["format"] != "imagenet" or not isinstance(state.get("epoch"), int)):
        raise UserError(
            f"--resume {path}: neither a checkpoint of this project nor one of the released ImageNet training, so "
            "there is no run to go on with; --finetune starts a new one from its weights"
        )
    newest = next(iter(checkpoint.kept(folder / "last.pt")), None) if folder else None
    if newest and not (path and path.samefile(newest)):
        raise UserError(f"{folder} holds a run already: go on with --resume auto, or choose another --output-dir")
    return folder, path, state


def claim(folder: Path) -> None:
    """Lock a run's folder for this process until it ends; raises `UserError` if another run writes to it."""
    if folder.resolve() in _held:
        return
    file = open(folder / LOCK, "a+")  # noqa: SIM115, closing it would unlock it
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no child inherits it, as `flock`'s, and it works over NFS
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"another run is writing to {folder} ({file.read(200).strip() or 'its process is not known'}): choose "
            "another --output-dir, or end that one first"
        ) from None
    except OSError as error:
        logger.warning(f"warning: {folder} cannot be locked ({error.strerror}): let no second run write to it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[folder.resolve()] = file
    for half in folder.glob("*.pt.tmp"):  # of a save that was killed
        if half.name in ("last.pt.tmp", "best.pt.tmp"):
            half.unlink()


def _whole_checkpoint(folder: Path) -> Path | None:
    """The newest that can be read; what is damaged is put aside."""
    best = folder / "best.pt"
    candidates = [*checkpoint.kept(folder / "last.pt"), *([best] if best.exists() else [])]
    for path in candidates:
        try:
            checkpoint.read(path)
        except UserError as error:
            aside = path.with_name(f"{path.name}.damaged")
            path.replace(aside)
            logger.warning(f"warning: {error}; it is kept as {aside.name}, and the one before is taken")
            continue
        return path
    if candidates:
        raise UserError(f"{folder}: no checkpoint can be read; the run can only start anew, with --output-dir NEW")
    return None


def _checkpoint_to_resume(cfg: Config, folder: Path | None) -> Path | None:
    if not folder and cfg.resume == "auto":
        raise UserError("--resume auto needs --output-dir, the folder of the run to go on with")
    if not folder and world.may_restart():
        raise UserError("torchrun --max-restarts needs --output-dir, so that a restart finds the run it goes on with")
    if (cfg.resume == "auto" or world.may_restart()) and folder.is_dir() and (path := _whole_checkpoint(folder)):
        if cfg.resume not in (None, "auto"):
            logger.info(f"--resume {cfg.resume} is left aside, for {folder} holds a run to go on with (--max-restarts)")
        return path
    return Path(cfg.resume) if cfg.resume not in (None, "auto") else None


def runs_of(cfg: Config) -> Path:
    """Where runs of this recipe, or of its variant, go without `--output-dir`."""
    return Path("output", "-".join(filter(None, (Path(cfg.config).stem, cfg.variant))))


def checkpoint_to_test(cfg: Config) -> Path:
    """What the flags name, else `best.pt` of the recipe's last run in `output/`."""
    named = cfg.checkpoint or cfg.resume or cfg.finetune
    if named == "auto" and cfg.output_dir:
        named = Path(cfg.output_dir) / "last.pt"
    if named:
        return Path(named)
    runs = runs_of(cfg)
    found = sorted(runs.glob("*/best.pt"), key=os.path.getmtime)
    if not found:
        raise UserError(f"test.py needs --checkpoint FILE, such as best.pt of a run (there is none in {runs})")
    return found[-1]


def recorded_settings(cfg: Config, recipe: Path, argv: Sequence[str], path: Path, state: dict) -> Config:
    """Those of the run that goes on, under the flags; a recipe named on the command line must say the same."""
    recorded = load(recipe, argv, state["config"])
    if cfg.config != str(recipe):
        for key in FIELDS:
            if key not in LOCAL_FIELDS and getattr(cfg, key) != getattr(recorded, key):
                raise UserError(
                    f"{path} is of a run with {key} = {getattr(recorded, key)!r}, where {cfg.config} has "
                    f"{getattr(cfg, key)!r}: --output-dir NEW branches off, and without --config the run goes on"
                )
    return recorded


def differences(cfg: Config, state: dict, keys: Sequence[str]) -> list[tuple[str, object, object]]:
    """(key, our value, the checkpoint's value) of each setting among `keys` that differs."""
    ours, theirs = plain(cfg), state["config"]
    return [(key, ours[key], theirs.get(key)) for key in keys if ours[key] != theirs.get(key)]


def recorded_split(folder: Path) -> dict[str, list[str]] | None:
    """The files of training and test set that a run in `folder` recorded, if it did."""
    path = folder / SPLIT
    if not path.exists():
        return None
    try:
        split = json.loads(path.read_text())
        is_valid = all(isinstance(file, str) for part in ("train", "test") for file in split[part])
    except (ValueError, TypeError, KeyError, RecursionError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{path}: damaged; move it away to go on without the record of the split")
    return split


def warn_of_seen(data: Data, checkpoint: Path) -> None:
    """Say so if test samples are among those that the run of `checkpoint` recorded as its training samples."""
    trained = (recorded_split(checkpoint.parent) or {}).get("train", ())
    if data.split and (seen := set(trained).intersection(data.split["test"])):
        logger.warning(
            f"warning: {len(seen)} of {len(data.split['test'])} test samples are training samples of {checkpoint}"
        )


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise `UserError` where the run's folder cannot be made or written to; a full disk does not say what was."""
    try:
        yield
    except OSError as error:
        ours, theirs = folder.absolute(), Path(error.filename or folder).absolute()
        is_ours = theirs.is_relative_to(ours) or ours.is_relative_to(theirs)
        if not is_ours or not (error.filename or error.errno in FULL):
            raise
        raise UserError(
            f"{folder} cannot be written to ({error.filename or 'a file in it'}: {error.strerror or error}): make room "
            "or choose another --output-dir; what was saved before stays"
        ) from None


@contextlib.contextmanager
def records(cfg: Config, here: World, folder: Path, data: Data, first_epoch: int) -> Iterator[RunLog | None]:
    """Write what the run is, and is trained on, to its folder, and give the main process its log."""
    if not here.is_main:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder)
    if first_epoch and recorded_split(folder) not in (None, data.split):
        raise UserError(
            f"{folder / SPLIT} is not how the data are split now: --split-seed or the data are others than when the "
            "run began; go on with what they were, or start anew with --output-dir NEW"
        )
    if data.split:
        log.write_whole(folder / SPLIT, json.dumps(data.split, indent=0) + "\n")
    if data.preview:
        data.preview(folder / "samples.png")
    about = folder / "run.json"
    try:
        starts = json.loads(about.read_text()) if about.exists() else []
        is_valid = isinstance(starts, list)
    except (ValueError, RecursionError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{about}: damaged; move it away to go on without the record of earlier starts")
    starts.append({**log.provenance(), "first_epoch": first_epoch, "config": plain(cfg)})
    log.write_whole(about, json.dumps(starts, indent=2) + "\n")
    settings = plain(cfg, without=("config", "variant", "output_dir", "resume", "checkpoint"))
    (folder / "config.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
    run_log = RunLog(folder, first_epoch)
    try:
        yield run_log
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk, say, of which more is to be told
            run_log.close()
        raise
    run_log.close()


def save(cfg: Config, here: World, folder: Path, trainer: Trainer, is_best: bool) -> None:
    """Write `last.pt`, and `best.pt` if it is, from the main process; all of them call it.

    Raises:
        UserError: weights are not finite, which no loss need show (a membrane that is not, never fires).
    """
    content = trainer.state() | {"config": plain(cfg, without=LOCAL_FIELDS)}
    if not here.is_main:
        return
    weights = [*content["state_dict"].values(), *(content["state_dict_ema"] or {}).values()]
    if not torch.stack([value.isfinite().all() for value in weights]).all():
        raise UserError(
            f"the weights are no longer finite in epoch {trainer.epoch + 1}: lower lr, or use --clip-grad 1 or bf16; "
            "what was saved before stays"
        )
    if is_best:  # first: killed in between, the epoch is evaluated again
        checkpoint.save(folder / "best.pt", content)
    checkpoint.save(folder / "last.pt", content, cfg.keep)
