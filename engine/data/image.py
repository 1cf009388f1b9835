"""Static images, through timm's transforms, mixup and prefetching loader.

Batches are (images [B,C,H,W] float32, normalised, on the device; labels [B] int64, or [B,classes] under mixup).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import Dataset

from ..config import Config
from ..dist import Dist
from ..errors import UserError


class ImageDataset(Protocol):
    """What a data set offers: PIL images with labels, `transform` (set by timm's loader), class names, channels."""

    classes: Sequence[str]
    channels: int
    transform: Callable | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[object, int]: ...


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, shipped inside the package.

    360 of them, a fifth of each class drawn with a fixed seed, are for testing.
    """

    classes = tuple(str(digit) for digit in range(10))
    channels = 1

    def __init__(self, train: bool):
        from sklearn.datasets import load_digits  # a second to import, and no other data set needs it
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
        images, labels = parts[0::2] if train else parts[1::2]
        self.images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)  # 0..16 to 0..255
        self.labels = labels.tolist()
        self.transform = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[object, int]:
        image = Image.fromarray(self.images[index])
        return (self.transform(image) if self.transform else image), self.labels[index]


class _Shard(Dataset):
    """The share of one process of an evaluation: whole batches in turn, each the same as in a single process.

    So nothing is counted twice, and a membrane that leaks over the batch meets the same neighbours.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, rank: int, world_size: int):
        self.dataset = dataset
        self.indices = [i for i in range(len(dataset)) if i // batch_size % world_size == rank]

    def __setattr__(self, name: str, value: object) -> None:
        if name == "transform":  # timm's loader sets it
            self.dataset.transform = value
        else:
            super().__setattr__(name, value)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.dataset[self.indices[index]]


@dataclass(frozen=True)
class Data:
    """Loaders of a run. `mixup` is timm's object, wherever it mixes; its `mixup_enabled` is the switch."""

    train: Iterable | None
    test: Iterable
    classes: list[str]
    mixup: object | None


DATASETS = {"digits": Digits}


def create_data(cfg: Config, dist: Dist, train: bool = True) -> Data:
    """The loaders that `cfg` describes.

    Raises:
        UserError: the data set has not `num_classes` classes or `in_channels` channels, a batch is larger than the
            set, or timm does not know the augmentation.
    """
    test_set = DATASETS[cfg.dataset](train=False)
    if len(test_set.classes) != cfg.num_classes:
        raise UserError(f"num_classes = {cfg.num_classes}: {cfg.dataset} has {len(test_set.classes)} classes")
    if test_set.channels != cfg.in_channels:
        raise UserError(f"in_channels = {cfg.in_channels}: {cfg.dataset} has {test_set.channels}")
    common = {
        "input_size": (cfg.in_channels, cfg.input_size, cfg.input_size),
        "mean": cfg.mean,
        "std": cfg.std,
        "num_workers": cfg.workers,
        "interpolation": cfg.interpolation,
        "device": dist.device,
        "pin_memory": dist.device.type == "cuda",
        # started anew each epoch, so that they hear of the end of mixup and draw from the epoch's seed
        "persistent_workers": False,
    }
    mixup = _mixup(cfg) if train and cfg.mixup else None
    eval_batch = cfg.eval_batch_size or cfg.batch_size
    test_shard = _Shard(test_set, eval_batch, dist.rank, dist.world_size)
    return Data(
        train=_train_loader(cfg, dist, mixup, common) if train else None,
        test=timm.data.create_loader(test_shard, batch_size=eval_batch, crop_pct=cfg.crop_pct, **common),
        classes=list(test_set.classes),
        mixup=mixup,
    )


def _train_loader(cfg: Config, dist: Dist, mixup: object, common: dict) -> Iterable:
    dataset = DATASETS[cfg.dataset](train=True)
    if len(dataset) < cfg.batch_size * dist.world_size:
        raise UserError(
            f"batch_size = {cfg.batch_size}: {dist.world_size} processes need more than the {len(dataset)} "
            f"training images of {cfg.dataset}; use a smaller batch_size"
        )
    try:
        loader = timm.data.create_loader(
            dataset,
            batch_size=cfg.batch_size,
            is_training=True,
            scale=cfg.scale,
            ratio=cfg.ratio,
            hflip=cfg.hflip,
            color_jitter=None,
            auto_augment=cfg.auto_augment,
            re_prob=cfg.reprob,
            re_mode=cfg.remode,
            collate_fn=mixup if cfg.mixup_in == "loader" else None,
            distributed=dist.world_size > 1,
            **common,
        )
    except (AssertionError, KeyError, ValueError, IndexError):
        if not cfg.auto_augment:
            raise
        raise UserError(f"auto_augment = {cfg.auto_augment!r}: timm has no such policy") from None
    if dist.world_size > 1:
        loader.sampler.seed = cfg.seed  # timm leaves it at 0
    return loader


def _mixup(cfg: Config) -> object:
    kind = timm.data.FastCollateMixup if cfg.mixup_in == "loader" else timm.data.Mixup
    return kind(
        mixup_alpha=cfg.mixup,
        prob=cfg.mixup_prob,
        mode=cfg.mixup_mode,
        label_smoothing=cfg.smoothing,
        num_classes=cfg.num_classes,
    )
