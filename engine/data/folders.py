"""Folders of data sets: where they are, and their parts for training and testing."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..cli import UserError
from ..config import Config

SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}  # part -> names of its folder, in any case


def is_hidden(path: str) -> bool:
    """Return True for files of systems and editors: `.DS_Store`, `._x.png`, `.ipynb_checkpoints`, `__MACOSX`."""
    return re.search(r"(^|[/\\])(\.[^./\\]|__MACOSX)", path) is not None


def require(cfg: Config, samples: str, allowed: Mapping[str, Sequence]) -> None:
    """Raise `UserError` for a setting with another value than a data set of these samples allows."""
    for key, values in allowed.items():
        if (value := getattr(cfg, key)) not in values:
            fix = " or ".join("none" if choice is None else str(choice) for choice in values)
            raise UserError(f"{key} = {value}: {cfg.dataset} has {samples}; use --{key.replace('_', '-')} {fix}")


def require_equal_classes(where: object, train: Collection[str], test: Collection[str]) -> None:
    """Raise `UserError` if training and test set have other classes."""
    if different := set(train) ^ set(test):
        name, part = min(different), "training" if min(different) in test else "test"
        raise UserError(f"{where}: the {part} set has no class {name}; training and test set need the same classes")


def require_classes(cfg: Config, count: int, where: object, train: bool) -> None:
    """Raise `UserError` if a data set has another number of classes than the network."""
    if count != cfg.num_classes:
        fix = f"use --num-classes {count}" if train else "evaluate on data with the classes of the checkpoint"
        raise UserError(f"num_classes = {cfg.num_classes}: {where} has {count} classes; {fix}")


def data_path(cfg: Config, must_exist: bool = True) -> Path:
    """Return the folder of the data set, absolute."""
    if cfg.data_path is None:
        raise UserError(f"dataset {cfg.dataset}: its folder is unknown; use --data-path")
    root = Path(cfg.data_path).resolve()
    if must_exist and not root.is_dir():
        download = " or --download" if cfg.dataset.startswith("torch/") else ""
        raise UserError(f"{root}: no such folder; use --data-path{download}, or make it as docs/data.md says")
    return root


def split_folders(root: Path) -> dict[str, Path]:
    """Return the existing folders of `root` for training ("train") and for testing ("test")."""
    present = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    matches = {part: [present[name] for name in names if name in present] for part, names in SPLITS.items()}
    folders = {part: paths[0] for part, paths in matches.items() if paths}
    if len(folders) == 2:
        train, test = (folder.resolve() for folder in folders.values())
        if train.is_relative_to(test) or test.is_relative_to(train):
            raise UserError(f"{folders['train']} and {folders['test']} overlap; keep test samples apart")
    return folders


def part_folder(root: Path, part: str) -> Path:
    """Return the folder of `root` for the part "train" or "test"; raise `UserError` if there is none."""
    if part not in (folders := split_folders(root)):
        raise UserError(f"{root}: no folder {SPLITS[part][0]}; make train and val, each with a folder per class")
    return folders[part]


def find_classes(folder: str | Path) -> tuple[list[str], dict[str, int]]:
    """Return the names of the class folders, sorted, and name -> label, as torchvision does."""
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir() and not is_hidden(path.name))
    if not names:
        raise UserError(f"{folder}: no folders in it; make one per class")
    return names, {name: label for label, name in enumerate(names)}
