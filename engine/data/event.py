"""Event frames of recordings and of the simulated digits.

Batches are (frames [B,T,2,H,W] float32, event counts, on the device; labels [B] int64).
To add a data set, write a function in recordings.py that lists its recordings, and name it in `RAW` there.
"""

import functools
import itertools
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
from .folders import data_path, require, require_classes
from .frames import WHOLE, Layout, frames_of
from .loaders import Data, create_loader, create_mixup
from .prepare import contents, prepare
from .recordings import RAW, Raw, event_folder

TRAIN_PART = 0.9  # of each class of CIFAR10-DVS
COUNTS = {"mean": (0.0, 0.0), "std": (1 / 255, 1 / 255)}  # counts stay, because timm's loader multiplies both by 255


class FrameFiles(Dataset):
    """Files CLASS/NAME of a frames folder as ([T,2,H,W] unsigned, label), in the order of spikingjelly's data sets."""

    def __init__(self, folder: Path, files: Sequence[str], classes: Sequence[str], layout: Layout):
        labels = {name: label for label, name in enumerate(classes)}
        self.folder, self.shape = folder, (layout.time_steps, 2, layout.side, layout.side)
        self.samples = sorted((labels[Path(file).parent.name], file) for file in files)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        label, file = self.samples[index]
        try:
            with (self.folder / file).open("rb") as content:
                frames = np.lib.format.read_array(content, allow_pickle=False)
            if frames.shape != self.shape or frames.dtype.kind != "u":
                raise ValueError(f"{frames.dtype} {frames.shape}")
        except Exception as error:  # a damaged file makes numpy fail in any way
            raise UserError(f"{self.folder / file}: unusable frames ({error}); delete {self.folder}") from None
        return frames, label


def create_data(cfg: Config, world: World, train: bool = True) -> Data:
    """Create the loaders of event frames; the first run makes the frames."""
    raw = RAW.get(cfg.dataset) or event_folder(data_path(cfg), cfg.split_seed)
    classes = list(raw.classes.values())
    allowed = {key: (FIELDS[key].default,) for key in names(ImageSettings)}
    allowed |= {"in_channels": (2,), "auto_augment": (None, "snn-wide")}
    allowed |= {"mixup_in": ("step",)} if cfg.mixup else {}
    allowed |= {"split_seed": (None,)} if raw.is_split else {}
    allowed |= {"sensor_size": (None,)} if raw.side else {}
    allowed |= {"data_path": (None,)} if cfg.dataset == "digits-dvs" else {}
    require(cfg, "event frames", allowed)
    require_classes(cfg, len(classes), cfg.data_path or cfg.dataset, train)
    if cfg.dataset == "digits-dvs":
        train_set = digits.create_frames(True, layout(cfg)) if train else None
        test_set, split = digits.create_frames(False, layout(cfg)), None
    else:
        train_set, test_set, split = _from_recordings(cfg, raw, world)
    is_augmented = train and (cfg.hflip or cfg.auto_augment)
    return Data(
        train=create_loader(cfg, world, train_set, True, collate, **COUNTS) if train else None,
        test=create_loader(cfg, world, test_set, False, collate, **COUNTS),
        classes=classes,
        mixup=create_mixup(cfg) if train else None,
        augment=SNNWideAugment(cfg.hflip, wide=cfg.auto_augment is not None) if is_augmented else None,
        split=split,
        show=pictures.of_events,
    )


def layout(cfg: Config) -> Layout:
    """Return the layout of the frames of a data set."""
    side = RAW[cfg.dataset].side if cfg.dataset in RAW else None
    sensor = (side, side) if side else cfg.sensor_size or (cfg.input_size, cfg.input_size)
    if len(sensor) != 2:
        raise UserError(f"sensor_size = {sensor}: needs height and width")
    return Layout(cfg.time_steps, sensor, cfg.input_size)


def read_recording(path: Path, cfg: Config) -> Tensor:
    """Return the frames [T,2,S,S] float32 of one file of events or frames."""
    samples, invalid = frames_of(str(path), path.read_bytes, {"": WHOLE}, layout(cfg))
    if invalid:
        logger.warning(f"warning: {path}: {invalid:,} invalid events are left out")
    return torch.from_numpy(samples[""].astype(np.float32))


def collate(samples: Sequence[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    """Stack frames in the smallest type that holds all their counts."""
    frames, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(frames)), torch.tensor(labels)


def _from_recordings(cfg: Config, raw: Raw, world: World) -> tuple[FrameFiles, FrameFiles, dict[str, list[str]]]:
    """Return training set, test set, and the files of each."""
    root, shape = data_path(cfg, must_exist=False), layout(cfg)
    find = functools.partial(raw.find, root, cfg.download)
    if not root.is_dir() and not cfg.download:
        find()  # raises an error that lists the files needed
    folder = distributed.in_turns(lambda: prepare(root, shape, find, world.is_main))
    files = contents(folder, raw.classes)
    if not raw.sizes and files != sorted(name for recording in find() for name in recording.samples):
        raise UserError(f"{folder}: not of the recordings in {root}; delete this folder of frames")
    parts = {part: [file for file in files if file.startswith(f"{part}/")] for part in ("train", "test")}
    split = parts if raw.is_split else split_by_class(files, cfg.split_seed)
    for part, chosen in split.items():
        if not chosen:
            raise UserError(f"{folder}: no samples for the {part} set; complete the data set")
        if len(chosen) != (size := raw.sizes.get(part, len(chosen))):
            logger.warning(f"warning: {folder}: {len(chosen):,} {part} samples, {cfg.dataset} has {size:,}")
    train_set, test_set = (FrameFiles(folder, split[part], list(raw.classes), shape) for part in ("train", "test"))
    return train_set, test_set, split


def split_by_class(files: Sequence[str], seed: int | None) -> dict[str, list[str]]:
    """Split each class into the first 90 % by name (with a seed: in random order), rounded up, and the rest.

    The split equals spikingjelly's `split_to_train_test_set` from 10 samples a class on. No class lacks a test sample.
    """
    rng = np.random.default_rng(seed)
    split = {"train": [], "test": []}
    for _, group in itertools.groupby(sorted(files), lambda file: Path(file).parent):
        members = list(group)
        if seed is not None:
            rng.shuffle(members)
        count = min(math.ceil(len(members) * TRAIN_PART), len(members) - 1)
        split["train"] += sorted(members[:count])
        split["test"] += sorted(members[count:])
    return split
