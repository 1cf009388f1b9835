"""Loaders of a run, for images and for event frames.

A sampler gives indices, a worker reads samples, `collate` stacks them as bytes, and timm's `PrefetchLoader` brings them
to the device as float32, minus `mean`, over `std`.
"""

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import timm.data
import torch
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from ..cli import UserError
from ..config import Config, mixes
from ..world import World


@dataclass(frozen=True)
class Data:
    """Loaders of a run, with classes, augmentation and pictures."""

    train: "TrainLoader | None"  # batches (samples, labels) on the device
    test: Iterable  # the same
    classes: list[str]  # names in the order of the labels
    mixup: object | None  # timm's; `mixup_enabled` is its switch
    show: Callable[[Tensor], Tensor]  # makes a picture [H,W,C] of a sample as the network sees it
    augment: Callable[[Tensor], Tensor] | None = None  # changes the samples of a training batch on the device
    split: dict[str, list[str]] | None = None  # files of the training and test set, if they are parts of one set


class TrainLoader:
    """Training batches on the device; an epoch can start at any batch."""

    def __init__(self, loader: PrefetchLoader):
        self.loader, self.source, self.length = loader, loader.loader, len(loader)
        self.dataset, self.sampler = self.source.dataset, self.source.sampler
        self.is_stream = isinstance(self.dataset, IterableDataset)
        self.workers = self.source.num_workers if self.is_stream else 0  # 0 if the order does not depend on them

    def __len__(self) -> int:
        return self.length

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Return batches of an epoch from number `first` on; only a stream reads the earlier ones."""
        for part in (self.sampler, self.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if self.is_stream:
            return itertools.islice(self.loader, first, None)
        self.source.batch_sampler.sampler = itertools.islice(self.sampler, first * self.source.batch_size, None)
        return iter(self.loader)


class _RoundRobin:
    """One rank's batches of a stream; each rank reads all and keeps its own, because a stream has no indices."""

    def __init__(self, loader: Iterable, world: World):
        self.loader, self.world, self.dataset = loader, world, loader.dataset

    def __len__(self) -> int:
        return len(range(self.world.rank, len(self.loader), self.world.world_size))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, size = 0, self.dataset.reader.num_samples
        for i, (samples, labels) in enumerate(self.loader):
            count += len(labels)
            if i % self.world.world_size == self.world.rank:
                yield samples, labels
        if size and count != size:  # timm's readers skip damaged samples
            raise UserError(f"test set: {count} of {size} samples are readable; fetch damaged files again")


class Seeded(Dataset):
    """Training set with augmentation that depends only on the seed, the epoch and the batch's first sample."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[object, int]]:
        """Return the samples of one batch, for DataLoader."""
        reseed(self.seed, self.epoch, indices[0], BATCH)
        return [self.dataset[index] for index in indices]


BATCH = 2**32 - 1  # separates seeds of batches from seeds of steps


def reseed(*numbers: int) -> None:
    """Seed Python, numpy and torch with all of the numbers together."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, timm's augmentation draws from it
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes ten times as long without CUDA
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def create_loader(
    cfg: Config, world: World, dataset: Dataset, train: bool, collate: Callable, mean: Sequence, std: Sequence
) -> "TrainLoader | Iterable":
    """Create a loader of shuffled training batches, or of one rank's share of the test set: whole batches, round-robin.

    So no sample counts twice, and a membrane that leaks over the batch has the same neighbours as on one rank.
    """
    is_stream, ranks = isinstance(dataset, IterableDataset), world.world_size
    batch_size = cfg.batch_size if train else cfg.eval_batch_size or cfg.batch_size
    workers = min(cfg.workers, os.cpu_count() or 1)
    if train and len(dataset) < batch_size * (1 if is_stream else ranks):  # the length of a stream is that of a rank
        raise UserError(f"batch_size = {batch_size}: {ranks} ranks share {len(dataset)} samples; use a smaller one")
    sampler = None
    if is_stream:
        shards, readers = len(dataset.reader.split_info.filenames), dataset.reader.dist_num_replicas
        if shards < readers:  # a worker without a shard would wait for ever
            raise UserError(f"{dataset.reader.root}: {readers} ranks cannot share {shards} shards; start fewer ranks")
        workers = min(workers, shards // readers)
        if train:
            workers = max(1, workers)  # without, timm goes on with the random numbers of the last epoch
        dataset.set_loader_cfg(workers)  # its length depends on them
    elif not train:
        sampler = [i for i in range(len(dataset)) if i // batch_size % ranks == world.rank]
    elif ranks > 1:
        sampler = DistributedSampler(dataset, ranks, world.rank, seed=cfg.seed)
    else:
        sampler = RandomSampler(dataset)
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        drop_last=train,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=_ignore_interrupts,
        persistent_workers=workers > 0 and not train,  # new workers learn the epoch and the end of mixup
    )
    loader = PrefetchLoader(loader, mean, std, cfg.in_channels, world.device)
    if train:
        return TrainLoader(loader)
    return _RoundRobin(loader, world) if is_stream else loader


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C in a worker, because the main process saves and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def create_mixup(cfg: Config) -> object | None:
    """Create timm's mixup for the loader or for the training step, if `cfg` mixes."""
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
