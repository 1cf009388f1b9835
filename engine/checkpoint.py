"""Checkpoints of this project, written atomically, and released ones; reading never runs code."""

import argparse
import contextlib
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
    """Read a checkpoint onto the CPU: of this project (*.pt, or *.safetensors of `analysis.export`), or a released one.

    Returns:
        The file's entries, plus `state_dict` (name -> tensor, as named in the file) and `format`: "qkformer",
        "imagenet", "cifar", "dvs", or "weights" for weights alone.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: not a file; name a checkpoint")
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
    config, classes = metadata["config"], metadata.get("classes", "[]")  # files of older versions have no names
    record = {"config": dict(json.loads(config)), "classes": list(json.loads(classes))}
    return state | {"format": "qkformer", **record}


def _recognised(content: object) -> dict:
    """Return the entries of a file with its `format` and `state_dict`; raise ValueError if it holds no weights."""
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}")
    content, entries = dict(content), ", ".join(map(str, list(content)[:10])) or "none"
    key = next((key for key in ("state_dict", "model", "net", "model_state_dict") if key in content), None)
    kinds = {"state_dict": "cifar" if "arch" in content else "weights"}
    kinds["model"] = "dvs" if "max_test_acc1" in content else "imagenet"
    state_dict, kind, content = content.get(key, content), kinds.get(key, "weights"), content if key else {}
    if content.get("format") == FORMAT:
        if wrong := [key for key, kind in ENTRIES.items() if not isinstance(content.get(key), kind)]:
            raise ValueError(", ".join(wrong))
        kind, content["classes"] = "qkformer", list(content.get("classes", []))  # older versions saved no names
    if not _is_weights(state_dict):
        raise ValueError(f"no weights; its entries are {entries}")
    averaged = content.get("state_dict_ema", content.get("model_ema"))
    if averaged and not _is_weights(averaged):
        raise ValueError("state_dict_ema")
    return content | {"format": kind, "state_dict": dict(state_dict), "state_dict_ema": averaged}


def _is_weights(value: object) -> bool:
    """Return True for named tensors with all elements stored: strides can make few bytes an enormous tensor."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    tensors = [item for item in value.values() if isinstance(item, torch.Tensor) and item.layout is torch.strided]
    is_stored = all(t.numel() * t.element_size() <= t.untyped_storage().nbytes() for t in tensors)
    return is_stored and 0 < len(value) == len(tensors)


def save(path: str | Path, content: dict, keep: int = 0) -> None:
    """Write a checkpoint of plain data atomically: a crash leaves the old file or the new one.

    `keep` older files stay: of last.pt as last-1.pt (the one before), last-2.pt and so on.
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
