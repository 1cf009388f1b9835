"""What loaders of images and of event frames have in common."""

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm.data
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from ..cli import UserError
from ..config import Config, mixes
from ..world import World


@dataclass(frozen=True)
class Data:
    """Loaders of a run, and what goes with them.

    Attributes:
        train, test: give batches (samples, labels) on the device.
        classes: names in the order of the labels.
        augment: what is done to the samples of a training batch on the device.
        mixup: timm's object, wherever it mixes; its `mixup_enabled` is the switch.
        show: makes a picture [H,W,C] of a sample as the network sees it.
        split: the files of training and test set, where they are parts of one set.
        preview: draws some training samples to a file.
    """

    train: "TrainLoader | None"
    test: Iterable
    classes: list[str]
    mixup: object | None
    show: Callable[[Tensor], Tensor]
    augment: Callable[[Tensor], Tensor] | None = None
    split: dict[str, list[str]] | None = None
    preview: Callable[[Path], None] | None = None


class TrainLoader:
    """The training batches, epoch by epoch, from any of them on.

    Args:
        loader: gives batches on the device; its `loader` is the DataLoader underneath.
    """

    def __init__(self, loader: Iterable):
        self.loader, self.source = loader, loader.loader
        self.dataset, self.sampler = self.source.dataset, self.source.sampler
        self.is_stream = isinstance(self.dataset, IterableDataset)
        self.workers = self.source.num_workers if self.is_stream else 0  # that the order of the samples hangs on
        if not self.is_stream:
            self.order = self.source.batch_sampler.sampler = _Rest(self.sampler)

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of an epoch without the `first` ones, which a stream has to read all the same."""
        for part in (self.sampler, self.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if self.is_stream:
            return itertools.islice(self.loader, first, None)
        self.order.skip = first * self.source.batch_size
        return iter(self.loader)


class _Rest(Sampler):
    """What a sampler gives behind its first `skip` samples; the length is that of all."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.skip = sampler, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self.sampler, self.skip, None)


def reseed(*numbers: int) -> None:
    """Seed Python, numpy and torch, CUDA included, by all of the numbers together.

    Not by `torch.manual_seed`, which takes ten times as long where there is no CUDA, and this is called at every step.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, timm's augmentation draws from it
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


BATCH = 2**32 - 1  # tells the seed of a batch from those of steps


class _Over(Dataset):
    """A data set over another one, whose transform it passes on."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    @property
    def transform(self) -> Callable | None:
        return self.dataset.transform

    @transform.setter
    def transform(self, value: Callable) -> None:  # timm's loader does
        self.dataset.transform = value


class Seeded(_Over):
    """A training set whose augmentation hangs on the seed, the epoch and the batch's first sample alone.

    So a batch is the same whatever was loaded before it, and by whichever process.
    """

    def __init__(self, dataset: Dataset, seed: int):
        super().__init__(dataset)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[object, int]]:
        """What a DataLoader calls for a batch, which it then mixes and collates."""
        reseed(self.seed, self.epoch, indices[0], BATCH)
        return [self.dataset[index] for index in indices]


class Shard(_Over):
    """The share of one process of an evaluation: whole batches in turn, each the same as in a single process.

    So nothing is counted twice, and a membrane that leaks over the batch meets the same neighbours.
    """

    def __init__(self, dataset: Dataset, batch_size: int, rank: int, world_size: int):
        super().__init__(dataset)
        self.indices = [i for i in range(len(dataset)) if i // batch_size % world_size == rank]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.dataset[self.indices[index]]


def require_batches(cfg: Config, world: World, samples: int) -> None:
    """Raise `UserError` if the training set is too small for one batch in every process."""
    if samples < cfg.batch_size * world.world_size:
        raise UserError(
            f"batch_size = {cfg.batch_size}: {world.world_size} processes need more than the {samples} "
            f"training samples of {cfg.dataset}; use a smaller batch_size"
        )


def worker_settings(cfg: Config, world: World) -> dict:
    """How a DataLoader is fed: at most one process a core, kept from pass to pass; pinned memory for a GPU."""
    workers = min(cfg.workers, os.cpu_count() or 1)
    return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": world.device.type == "cuda"}


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
