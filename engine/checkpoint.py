"""Checkpoints: ours, written atomically, and the released ones. None is trusted: reading never runs code."""

import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from .cli import UserError

FORMAT = "qkformer-1"
ENTRIES = ("state_dict", "optimizer", "scaler", "epoch", "position", "best", "config")


def read(path: str | Path) -> dict:
    """Read a checkpoint of ours, or a released one of ImageNet, CIFAR, DVS or MS-QKFormer, onto the CPU.

    A file `*.safetensors` holds weights, and if `analysis.export` wrote it, the settings of the run that trained them.

    Returns:
        The file's own entries, plus `state_dict` (name -> tensor, as named in the file) and `format`:
        "qkformer" (without `optimizer` if it is a safetensors file), "imagenet", "cifar", "dvs", or "weights" for a
        file of weights alone.

    Raises:
        UserError: it is missing, cut or altered, holds no weights, or holds anything but plain data. Objects other than
            `argparse.Namespace` are refused unread, for unpickling one can run code.
    """
    if not Path(path).is_file():
        raise UserError(f"checkpoint {path} {'is no file' if os.path.lexists(path) else 'does not exist'}")
    with open(path, "rb"):  # whether it may be read is not a question of what it holds
        pass
    if Path(path).suffix == ".safetensors":
        return _read_safetensors(path)
    if _is_archive(path):
        _verify(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # torch's about pickles of other kinds, which it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"checkpoint {path}: refused, {_reason(error)}") from None
    except Exception as error:  # a damaged file makes the reader fail in any way
        _raise_if_of_the_machine(error)
        raise UserError(
            f"checkpoint {path}: truncated, or not a checkpoint; fetch it again, or take an older one"
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {path}: holds no weights but a {type(content).__name__}")
    return _recognised(dict(content), path)


def _is_archive(path: str | Path) -> bool:
    """Whether torch takes the file for the archive that it writes since 1.6: by its first bytes alone."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _verify(path: str | Path) -> None:
    """Compare each part of the archive that a checkpoint is with its checksum, which torch writes and does not read."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            is_plain = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
            is_plain &= not any(part.external_attr & 16 for part in parts)  # of folders torch reads what was in memory
            is_plain &= sum(part.file_size for part in parts) <= os.path.getsize(path)
            altered = archive.testzip() if is_plain else None
    except Exception as error:  # a damaged archive makes the reader fail in any way
        _raise_if_of_the_machine(error)
        raise UserError(f"checkpoint {path}: truncated or altered; fetch it again, or take an older one") from None
    if not is_plain:
        raise UserError(
            f"checkpoint {path}: refused, its parts are packed or marked as torch never does; fetch it again"
        )
    if altered:
        raise UserError(
            f"checkpoint {path}: altered, {altered} in it is not what was written; fetch it again, or take an older one"
        )


def _raise_if_of_the_machine(error: Exception) -> None:
    """Raise what says nothing about the file: the memory is full, or the disk fails."""
    is_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    if is_memory or getattr(error, "errno", None) in (errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOMEM):
        raise error


def _read_safetensors(path: str | Path) -> dict:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise UserError(f"checkpoint {path}: needs safetensors ({error}): pip install -r requirements.txt") from None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError:
        raise UserError(f"checkpoint {path}: truncated, or not a safetensors file; fetch it again") from None
    if "config" not in metadata:
        return _recognised(weights, path)
    try:
        config = json.loads(metadata["config"])
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not weights:
        raise UserError(f"checkpoint {path}: damaged, its config is not what it should be, or it holds no weights")
    if metadata.get("sha256", digest := fingerprint(weights, metadata["config"])) != digest:
        raise UserError(f"checkpoint {path}: altered, it differs from its checksum; fetch it again")
    return {"format": "qkformer", "state_dict": weights, "config": config}


def fingerprint(weights: Mapping[str, torch.Tensor], config: str) -> str:
    """SHA-256 of weights and settings, for safetensors' format has no checksum of its own."""
    digest = hashlib.sha256(config.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _reason(error: pickle.UnpicklingError) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)|function ([\w.]+)", str(error))
    if found:
        name = next(filter(None, found.groups()))
        return f"it holds {name}, not plain data, and could run code; ask its author for the weights alone"
    return "it is damaged, or holds more than plain data; fetch it again or ask its author for the weights alone"


def _recognised(content: dict, path: str | Path) -> dict:
    found = list(content)
    if content.get("format") == FORMAT:
        content = {"position": {"steps_done": 0, "order": {}, "processes": [{"loss_sum": 0, "seen": 0}]}} | content
        if absent := [key for key in ENTRIES if key not in content]:
            raise UserError(f"checkpoint {path}: damaged, it lacks {', '.join(absent)}")
        kinds = dict.fromkeys(("optimizer", "scaler", "position", "best", "config"), dict) | {"epoch": int}
        if wrong := [key for key, kind in kinds.items() if not isinstance(content[key], kind)]:
            raise UserError(f"checkpoint {path}: damaged, its {', '.join(wrong)} is not what it should be")
        if content.get("state_dict_ema") is not None and not _is_weights(content["state_dict_ema"]):
            raise UserError(f"checkpoint {path}: damaged, its state_dict_ema holds no weights")
        kind, state_dict = "qkformer", content["state_dict"]
    elif "state_dict" in content:
        kind, state_dict = ("cifar" if "arch" in content else "weights"), content["state_dict"]
    elif "model" in content:
        kind, state_dict = ("dvs" if "max_test_acc1" in content else "imagenet"), content["model"]
    else:
        kind, state_dict, content = "weights", content, {}
    if not _is_weights(state_dict):
        entries = ", ".join(map(str, found[:10])) or "none"
        raise UserError(f"checkpoint {path}: holds no weights; its entries are {entries}")
    return content | {"format": kind, "state_dict": dict(state_dict)}


def _is_weights(value: object) -> bool:
    is_named = isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(entry, torch.Tensor) and _is_whole(entry) for key, entry in value.items()
    )
    return is_named and len(value) > 0


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether each element is there: a few bytes can also be shown as an enormous tensor."""
    is_plain = tensor.layout is torch.strided
    return is_plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def save(path: str | Path, content: dict, keep: int = 0) -> None:
    """Write a checkpoint of plain data atomically: a crash leaves the old file or the new one, never half of it.

    Args:
        keep: how many of the files before are kept, as last-1.pt (the one before), last-2.pt and so on of last.pt.

    Raises:
        UserError: it cannot be written; the old file stays.
    """
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content | {"format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        _rotate([path, *(path.with_stem(f"{path.stem}-{i}") for i in range(1, keep + 1))])
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch's writer hides it
        reason = getattr(cause, "strerror", None) or cause
        raise UserError(f"cannot write the checkpoint {path}: {reason}; what was saved before stays") from None


def kept(path: Path) -> list[Path]:
    """The checkpoint, and those before it that `save` has kept: what there is, the newest first."""
    pattern = re.compile(rf"{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}")
    numbers = {int(found[1]): file for file in path.parent.glob("*") if (found := pattern.fullmatch(file.name))}
    return [path] * path.exists() + [file for _, file in sorted(numbers.items())]


def _rotate(files: list[Path]) -> None:
    """Give each file the name of the next; the first also keeps its own, so that there is always one."""
    for newer, older in reversed(list(itertools.pairwise(files))):
        if not newer.exists():
            continue
        if newer != files[0]:
            os.replace(newer, older)
            continue
        older.unlink(missing_ok=True)
        try:
            os.link(newer, older)
        except OSError:  # some disks know no links
            os.replace(newer, older)


def _sync_folder(folder: Path) -> None:
    """Have the disk keep the names, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems cannot, and the file is there
        os.fsync(descriptor)
    os.close(descriptor)
