"""Checkpoints: ours, written atomically, and the released ones. All are untrusted: reading never runs code."""

import argparse
import contextlib
import hashlib
import io
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
from safetensors import safe_open

from .cli import UserError, is_out_of_memory

FORMAT = "qkformer-1"
ENTRIES = dict.fromkeys(("optimizer", "scaler", "position", "best", "config"), dict) | {"epoch": int}  # besides weights


def read(path: str | Path) -> dict:
    """Read a checkpoint of ours, or a released one of ImageNet, CIFAR, DVS or MS-QKFormer, onto the CPU.

    A file `*.safetensors` holds weights and, if `analysis.export` wrote it, the settings of the run that trained them.

    Returns:
        The file's own entries, plus `state_dict` (name -> tensor, as named in the file) and `format`:
        "qkformer" (without `optimizer` if it is a safetensors file), "imagenet", "cifar", "dvs", or "weights" for a
        file of weights alone.

    Raises:
        UserError: the file is missing, truncated or altered, holds no weights, or anything but plain data. Objects
            other than `argparse.Namespace` are refused, because unpickling them can run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if os.path.lexists(path) else 'does not exist'}; name a checkpoint")
    path.open("rb").close()  # its OSError, if any, says more than those of the readers
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _recognised(_unpickled(path.read_bytes()))
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        what = f"it holds {name[1]}, which could run code" if name else "it is damaged, or holds more than plain data"
        raise UserError(f"{path}: refused, {what}; ask its author for the weights alone") from None
    except Exception as error:  # damaged files make the readers fail in many ways
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: damaged, or no checkpoint ({reason}); fetch it again, or use an older one") from None


def _unpickled(content: bytes) -> object:
    """Load a file of torch without running code; verify its checksums, which torch writes but does not check."""
    if content.startswith(b"PK\x03\x04"):  # the archive that torch writes since 1.6
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            parts = archive.infolist()
            is_plain = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
            is_plain &= not any(part.external_attr & 16 for part in parts)  # torch reads folders from stray memory
            if not is_plain or sum(part.file_size for part in parts) > len(content):
                raise ValueError("its parts are packed or marked as torch never does")
            if altered := archive.testzip():
                raise ValueError(f"{altered} differs from its checksum")
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # about pickles of other kinds, which torch then refuses
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = _recognised({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, it is no mapping
    if "config" not in metadata:
        return state
    classes = metadata.get("classes", "")  # files of older versions have none
    if metadata["sha256"] != fingerprint(state["state_dict"], metadata["config"] + classes):
        raise ValueError("it differs from its checksum")
    about = {"config": dict(json.loads(metadata["config"])), "classes": list(json.loads(classes or "[]"))}
    return state | about | {"format": "qkformer"}


def fingerprint(weights: Mapping[str, torch.Tensor], about: str) -> str:
    """Return the SHA-256 of weights and of the text about them, because safetensors has no checksum of its own."""
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _recognised(content: object) -> dict:
    """Return the entries of a file with its `format` and `state_dict`; raise ValueError if it holds no weights."""
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}")
    content, entries = dict(content), ", ".join(map(str, list(content)[:10])) or "none"
    if content.get("format") == FORMAT:
        if wrong := [key for key, kind in ENTRIES.items() if not isinstance(content.get(key), kind)]:
            raise ValueError(", ".join(wrong))
        kind, state_dict = "qkformer", content.get("state_dict")
        content["classes"] = list(content.get("classes", []))  # names; files of older versions have none
    elif "state_dict" in content:
        kind, state_dict = ("cifar" if "arch" in content else "weights"), content["state_dict"]
    elif "model" in content:
        kind, state_dict = ("dvs" if "max_test_acc1" in content else "imagenet"), content["model"]
    elif key := next((key for key in ("net", "model_state_dict") if key in content), None):
        kind, state_dict = "weights", content[key]
    else:
        kind, state_dict, content = "weights", content, {}
    if not _is_weights(state_dict):
        raise ValueError(f"no weights; its entries are {entries}")
    averaged = content.get("state_dict_ema", content.get("model_ema"))
    if averaged and not _is_weights(averaged):
        raise ValueError("state_dict_ema")
    return content | {"format": kind, "state_dict": dict(state_dict), "state_dict_ema": averaged}


def _is_weights(value: object) -> bool:
    """Tell if these are named tensors, each element stored: strides can show a few bytes as an enormous tensor."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    tensors = [item for item in value.values() if isinstance(item, torch.Tensor) and item.layout is torch.strided]
    is_stored = all(t.numel() * t.element_size() <= t.untyped_storage().nbytes() for t in tensors)
    return is_stored and 0 < len(value) == len(tensors)


def save(path: str | Path, content: dict, keep: int = 0) -> None:
    """Write a checkpoint of plain data atomically: a crash leaves the old file or the new one.

    Args:
        keep: number of older files to keep: of last.pt as last-1.pt (the one before), last-2.pt and so on.

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
        names = [path, *(path.with_stem(f"{path.stem}-{i}") for i in range(1, keep + 1))]
        for newer, older in reversed(list(itertools.pairwise(names))):
            if newer.exists():
                os.replace(newer, older)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems cannot
            descriptor = os.open(path.parent, os.O_RDONLY)
            os.fsync(descriptor)  # the names of files, too
            os.close(descriptor)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch's writer hides it
        raise UserError(f"{path}: cannot be written ({cause}); earlier checkpoints stay") from None


def kept(path: Path) -> list[Path]:
    """Return the checkpoint, if it exists, and the older ones that `save` kept, newest first."""
    pattern = re.compile(rf"{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}")
    numbers = {int(match[1]): file for file in path.parent.glob("*") if (match := pattern.fullmatch(file.name))}
    return [path] * path.exists() + [file for _, file in sorted(numbers.items())]
