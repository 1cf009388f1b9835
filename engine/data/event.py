"""Event frames: DVS128 Gesture, CIFAR10-DVS and the simulated digits.

Batches are (frames [B,T,2,H,W] float32, event counts, on the device; labels [B] int64). Workers collate unsigned
integers, a quarter of the bytes of float32.

To add a data set of recordings, write a function in recordings.py that lists them, and name it in `RAW` there.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import world as distributed
from ..cli import UserError
from ..config import Config
from ..log import logger
from ..settings import FIELDS, ImageSettings, names
from ..world import World
from . import digits, pictures
from .augment import SNNWideAugment
from .folders import data_path
from .loaders import Data, create_loader, create_mixup
from .prepare import contents, prepare
from .recordings import RAW

TRAIN_PART = 0.9  # of each class of CIFAR10-DVS
COUNTS = {"mean": (0.0, 0.0), "std": (1 / 255, 1 / 255)}  # timm's loader multiplies both by 255: counts stay counts


class FrameFiles(Dataset):
    """Some files of a frames folder with labels: ([T,2,H,W] unsigned, label), in the order of spikingjelly's data sets.

    Each file is in a folder named like its class; `classes` are in the order of the labels.
    """

    def __init__(self, folder: Path, files: Sequence[str], classes: Sequence[str], shape: tuple[int, ...]):
        labels = {name: label for label, name in enumerate(classes)}
        self.folder, self.shape = folder, shape
        self.samples = sorted((labels[Path(file).parent.name], file) for file in files)
        self.labels = [label for label, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        label, file = self.samples[index]
        try:
            frames = np.load(self.folder / file, allow_pickle=False)
            problem = None if frames.shape == self.shape and frames.dtype.kind == "u" else "damaged"
        except Exception as error:  # a damaged file makes numpy fail in any way
            problem = getattr(error, "strerror", None) or "damaged"
        if problem:
            raise UserError(f"{self.folder / file}: {problem}; delete {self.folder}, the next run makes it again")
        return frames, label


def create_data(cfg: Config, world: World, train: bool = True) -> Data:
    """Create the loaders of the event frames that `cfg` describes; the first run makes frames of the recordings."""
    is_simulated = cfg.dataset == "digits-dvs"
    classes = list(digits.Digits.classes if is_simulated else RAW[cfg.dataset].classes.values())
    side = digits.SIDE if is_simulated else RAW[cfg.dataset].side
    _require_settings_of_events(cfg, len(classes), side, is_simulated or RAW[cfg.dataset].is_split)
    if is_simulated:
        train_set = digits.DigitsDVS(True, cfg.time_steps) if train else None
        test_set, split = digits.DigitsDVS(False, cfg.time_steps), None
    else:
        train_set, test_set, split = _from_recordings(cfg, world)
    is_augmented = train and (cfg.hflip or cfg.auto_augment)
    return Data(
        train=create_loader(cfg, world, train_set, True, collate, **COUNTS) if train else None,
        test=create_loader(cfg, world, test_set, False, collate, **COUNTS),
        classes=classes,
        mixup=create_mixup(cfg) if train else None,
        augment=SNNWideAugment(cfg.hflip, wide=cfg.auto_augment is not None) if is_augmented else None,
        split=split,
        show=pictures.of_events,
        preview=functools.partial(_preview, train_set, classes) if train else None,
    )


def _require_settings_of_events(cfg: Config, classes: int, side: int, is_split: bool) -> None:
    allowed = {key: (FIELDS[key].default,) for key in names(ImageSettings)}
    allowed |= {"num_classes": (classes,), "input_size": (side,), "in_channels": (2,)}
    allowed |= {"auto_augment": (None, "snn-wide"), "mixup_in": ("step",) if cfg.mixup else (cfg.mixup_in,)}
    allowed |= {"split_seed": (None,)} if is_split else {}
    for key, values in allowed.items():
        if getattr(cfg, key) not in values:
            fix = " or ".join(map(str, values))
            raise UserError(f"{key} = {getattr(cfg, key)}: {cfg.dataset} has event frames; use {fix}")


def collate(samples: Sequence[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    """Stack frames in the smallest type that holds all their counts."""
    frames, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(frames)), torch.tensor(labels)


def _from_recordings(cfg: Config, world: World) -> tuple[FrameFiles, FrameFiles, dict[str, list[str]]]:
    """Return training set, test set, and the files of each."""
    root, raw = data_path(cfg, must_exist=False), RAW[cfg.dataset]
    find = functools.partial(raw.find, root, raw.suffix, cfg.download)
    if not root.is_dir() and not cfg.download:
        find()  # raises the error that lists the files needed
    folder = distributed.in_turns(lambda: prepare(root, cfg.time_steps, raw.side, find, world.is_main))
    files = contents(folder, raw.classes)
    if raw.is_split:
        split = {part: [file for file in files if file.startswith(f"{part}/")] for part in ("train", "test")}
    else:
        split = split_by_class(files, cfg.split_seed)
    for part, chosen in split.items():
        if not chosen:
            raise UserError(f"{folder}: no samples for the {part} set; complete the data set")
        if len(chosen) != raw.sizes[part]:
            logger.warning(f"warning: {folder}: {len(chosen):,} {part} samples, {cfg.dataset} has {raw.sizes[part]:,}")
    shape = (cfg.time_steps, 2, raw.side, raw.side)
    train_set, test_set = (FrameFiles(folder, split[part], list(raw.classes), shape) for part in ("train", "test"))
    return train_set, test_set, split


def split_by_class(files: Sequence[str], seed: int | None) -> dict[str, list[str]]:
    """Split into the first 90 % of each class, rounded up ("train"), and the others, at least one ("test").

    The order is that of the names, as text; with a seed, a random one. From 10 samples a class on it equals
    spikingjelly's `split_to_train_test_set`, which reads every sample for it.
    """
    rng = np.random.default_rng(seed)
    split = {"train": [], "test": []}
    for label in sorted({Path(file).parent for file in files}):
        members = sorted(file for file in files if Path(file).parent == label)
        if seed is not None:
            rng.shuffle(members)
        count = min(math.ceil(len(members) * TRAIN_PART), len(members) - 1)
        split["train"] += sorted(members[:count])
        split["test"] += sorted(members[count:])
    return split


def _preview(dataset: Dataset, names: Sequence[str], path: Path, most: int = 6) -> None:
    """Draw the first sample of each of the first classes."""
    first = {label: dataset.labels.index(label) for label in sorted(set(dataset.labels))[:most]}
    samples = [dataset[index] for index in first.values()]
    pictures.frames([torch.from_numpy(frames) for frames, _ in samples], [names[label] for _, label in samples], path)
