"""Event frames: DVS128 Gesture, CIFAR10-DVS and the simulated digits.

Batches are (frames [B,T,2,H,W] float32, event counts, on the device; labels [B] int64). A loader's processes hand over
bytes, a quarter of that.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from .. import pictures
from .. import world as distributed
from ..cli import UserError
from ..config import Config
from ..log import logger
from ..world import World
from . import digits_dvs, recordings
from .aedat import SIDE
from .augment import SNNWideAugment
from .datasets import Digits
from .frames import integrate
from .loaders import Data, Shard, TrainLoader, create_mixup, require_batches, worker_settings
from .prepare import contents, prepare

TRAIN_PART = 0.9  # of each class of CIFAR10-DVS


class Raw(NamedTuple):
    """A data set that comes as recordings."""

    find: Callable[[Path, bool], list[recordings.Recording]]
    classes: dict[str, str]  # class folder -> name
    sizes: dict[str, int]  # published samples of each part


RAW = {
    "cifar10-dvs": Raw(
        recordings.cifar10_dvs, {name: name for name in recordings.CIFAR10_CLASSES}, {"train": 9000, "test": 1000}
    ),
    "dvs128-gesture": Raw(recordings.dvs128_gesture, recordings.GESTURES, {"train": 1176, "test": 288}),
}


class Frames(Dataset):
    """Files of a frames folder with labels: ([T,2,H,W] unsigned, label), in the order of spikingjelly's data sets.

    Args:
        folder: a folder that `prepare` made.
        files: which of its files, each in a folder named like its class.
        classes: class folders in the order of the labels.
        frames: T.
    """

    def __init__(self, folder: Path, files: Sequence[str], classes: Sequence[str], frames: int):
        labels = {name: label for label, name in enumerate(classes)}
        self.folder, self.shape = folder, (frames, 2, SIDE, SIDE)
        self.samples = sorted((labels[Path(file).parent.name], file) for file in files)
        self.labels = [label for label, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        label, file = self.samples[index]
        try:
            frames = np.load(self.folder / file, allow_pickle=False)
            state = None if frames.shape == self.shape and frames.dtype.kind == "u" else "damaged"
        except OSError as error:
            state = f"cannot be read ({error.strerror})"
        except Exception:  # a damaged file makes numpy fail in any way
            state = "damaged"
        if state:
            remedy = f"delete {self.folder}, and it is made anew from the recordings"
            raise UserError(f"{self.folder / file}: {state}; {remedy}")
        return frames, label


class DigitsDVS(Dataset):
    """scikit-learn's digits before a simulated event camera: ([T,2,32,32] unsigned, label)."""

    def __init__(self, train: bool, frames: int):
        digits = Digits(train)
        events = digits_dvs.record(digits.images, seed=0 if train else 1)
        self.frames = [integrate(sample, frames, digits_dvs.SIDE) for sample in events]
        self.labels = digits.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.frames[index], self.labels[index]


def create_data(cfg: Config, world: World, train: bool = True) -> Data:
    """The loaders that `cfg` describes; the first time, frames are made from the recordings.

    Raises:
        UserError: recordings are missing or damaged, the settings do not fit the data set, or a batch is larger
            than it.
    """
    is_simulated = cfg.dataset == "digits-dvs"
    names = list(Digits.classes if is_simulated else RAW[cfg.dataset].classes.values())
    side = digits_dvs.SIDE if is_simulated else SIDE
    for key, value in (("num_classes", len(names)), ("input_size", side), ("in_channels", 2)):
        if getattr(cfg, key) != value:
            raise UserError(f"{key} = {getattr(cfg, key)}: {cfg.dataset} has {value}")
    if is_simulated:
        make = functools.partial(DigitsDVS, frames=cfg.time_steps)
        train_set, test_set, split = make(train=True) if train else None, make(train=False), None
    else:
        train_set, test_set, split = _from_recordings(cfg, world)
    return Data(
        train=_train_loader(cfg, world, train_set) if train else None,
        test=_test_loader(cfg, world, test_set),
        classes=names,
        mixup=create_mixup(cfg) if train else None,
        augment=_augmentation(cfg) if train else None,
        split=split,
        show=pictures.of_events,
        preview=functools.partial(_preview, train_set, names) if train else None,
    )


def _from_recordings(cfg: Config, world: World) -> tuple[Frames, Frames, dict[str, list[str]]]:
    """Training set, test set, and the files of each."""
    if cfg.data_path is None:
        raise UserError(f"dataset {cfg.dataset}: say where it is with --data-path")
    root = Path(cfg.data_path)
    raw = RAW[cfg.dataset]
    find = functools.partial(raw.find, root, cfg.download)
    if cfg.download:
        root.mkdir(parents=True, exist_ok=True)
    elif not root.is_dir():
        find()  # says what to place where
    folder = distributed.in_turns(lambda: prepare(root, cfg.time_steps, find, world.is_main))
    files = contents(folder, raw.classes)
    if cfg.dataset == "dvs128-gesture":  # its lists of trials split it
        split = {part: [file for file in files if file.startswith(f"{part}/")] for part in ("train", "test")}
    else:
        split = split_by_class(files, cfg.split_seed)
    for part, chosen in split.items():
        if not chosen:
            raise UserError(f"{folder}: no samples are left for the {part} set; complete the data set")
        if len(chosen) != raw.sizes[part]:
            logger.warning(
                f"warning: {folder} has {len(chosen):,} {part} samples where {cfg.dataset} has {raw.sizes[part]:,}"
            )
    return *(Frames(folder, split[part], list(raw.classes), cfg.time_steps) for part in ("train", "test")), split


def split_by_class(files: Sequence[str], seed: int | None) -> dict[str, list[str]]:
    """The first 90 % of each class, rounded up, for training ("train"), the others, at least one, for testing ("test").

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


class _Loader:
    """A DataLoader whose batches come on the device."""

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device, self.dataset = loader, device, loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        torch.empty((), dtype=torch.int64).random_()  # as much as new workers draw: an epoch is the same with old ones
        for frames, labels in self.loader:
            frames = frames.to(self.device, non_blocking=True).float()
            yield frames, labels.to(self.device, non_blocking=True)


def _collate(samples: Sequence[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    frames, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(frames)), torch.tensor(labels)  # numpy finds the type that holds all counts


def _train_loader(cfg: Config, world: World, dataset: Dataset) -> TrainLoader:
    require_batches(cfg, world, len(dataset))
    sampler = RandomSampler(dataset)
    if world.world_size > 1:
        sampler = DistributedSampler(dataset, world.world_size, world.rank, seed=cfg.seed)
    generator = torch.Generator()  # of the workers' seeds, and they draw nothing
    return TrainLoader(
        _loader(cfg, world, dataset, cfg.batch_size, sampler=sampler, drop_last=True, generator=generator)
    )


def _test_loader(cfg: Config, world: World, dataset: Dataset) -> _Loader:
    batch_size = cfg.eval_batch_size or cfg.batch_size
    return _loader(cfg, world, Shard(dataset, batch_size, world.rank, world.world_size), batch_size)


def _loader(cfg: Config, world: World, dataset: Dataset, batch_size: int, **settings) -> _Loader:
    settings |= {"collate_fn": _collate, **worker_settings(cfg, world)}
    return _Loader(DataLoader(dataset, batch_size, **settings), world.device)


def _augmentation(cfg: Config) -> SNNWideAugment | None:
    return SNNWideAugment(cfg.hflip, wide=cfg.auto_augment is not None) if cfg.hflip or cfg.auto_augment else None


def _preview(dataset: Dataset, names: Sequence[str], path: Path, most: int = 6) -> None:
    """Draw the first sample of each of the first classes."""
    first = {label: dataset.labels.index(label) for label in sorted(set(dataset.labels))[:most]}
    samples = [dataset[index] for index in first.values()]
    pictures.frames([torch.from_numpy(frames) for frames, _ in samples], [names[label] for _, label in samples], path)
