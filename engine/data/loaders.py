"""What loaders of images and of event frames have in common."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import timm.data
from torch import Tensor
from torch.utils.data import Dataset

from ..config import Config, mixes
from ..dist import Dist
from ..errors import UserError


@dataclass(frozen=True)
class Data:
    """Loaders of a run, and what goes with them.

    Attributes:
        train, test: give batches (samples, labels) on the device.
        classes: names in the order of the labels.
        mixup: timm's object, wherever it mixes; its `mixup_enabled` is the switch.
        show: makes a picture [H,W,C] of a sample as the network sees it.
        split: the files of training and test set, where they are parts of one set.
        preview: draws some training samples to a file.
    """

    train: Iterable | None
    test: Iterable
    classes: list[str]
    mixup: object | None
    show: Callable[[Tensor], Tensor]
    split: dict[str, list[str]] | None = None
    preview: Callable[[Path], None] | None = None


class Shard(Dataset):
    """The share of one process of an evaluation: whole batches in turn, each the same as in a single process.

    So nothing is counted twice, and a membrane that leaks over the batch meets the same neighbours.
    """

    def __init__(self, dataset: Dataset, batch_size: int, rank: int, world_size: int):
        self.dataset = dataset
        self.indices = [i for i in range(len(dataset)) if i // batch_size % world_size == rank]

    @property
    def transform(self) -> Callable | None:
        return self.dataset.transform

    @transform.setter
    def transform(self, value: Callable) -> None:  # timm's loader does
        self.dataset.transform = value

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.dataset[self.indices[index]]


def require_batches(cfg: Config, dist: Dist, samples: int) -> None:
    """Raise `UserError` if the training set is too small for one batch in every process."""
    if samples < cfg.batch_size * dist.world_size:
        raise UserError(
            f"batch_size = {cfg.batch_size}: {dist.world_size} processes need more than the {samples} "
            f"training samples of {cfg.dataset}; use a smaller batch_size"
        )


def worker_settings(cfg: Config, dist: Dist) -> dict:
    """How a DataLoader is fed: at most one process a core, kept from pass to pass; pinned memory for a GPU."""
    workers = min(cfg.workers, os.cpu_count() or 1)
    return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": dist.device.type == "cuda"}


def create_mixup(cfg: Config) -> object | None:
    """timm's object that mixes the samples of a batch, in the loader or in the training step; None where none does."""
    if not mixes(cfg):
        return None
    kind = timm.data.FastCollateMixup if cfg.mixup_in == "loader" else timm.data.Mixup
    return kind(
        mixup_alpha=cfg.mixup,
        cutmix_alpha=cfg.cutmix,
        cutmix_minmax=cfg.cutmix_minmax,
        prob=cfg.mixup_prob,
        switch_prob=cfg.mixup_switch_prob,
        mode=cfg.mixup_mode,
        label_smoothing=cfg.smoothing,
        num_classes=cfg.num_classes,
    )
