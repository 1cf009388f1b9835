"""Static images, through timm's transforms, mixup and prefetching loader.

Batches are (images [B,C,H,W] float32, normalised, on the device; labels [B] int64, or [B,classes] under mixup).
"""

import functools
from collections.abc import Iterable, Iterator

import timm.data
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ToNumpy
from torch.utils.data import Dataset, IterableDataset

from .. import pictures
from ..cli import UserError
from ..config import Config
from ..world import World
from .datasets import class_names, create_dataset, is_imagenet
from .loaders import (
    Data,
    Seeded,
    Shard,
    TrainLoader,
    create_mixup,
    require_batches,
    worker_settings,
)


class _Turns:
    """The same for the loader of a stream, which has no indices: every process reads all, and keeps its batches."""

    def __init__(self, loader: Iterable, rank: int, world_size: int):
        self.loader, self.rank, self.world_size = loader, rank, world_size
        self.size = getattr(loader.dataset.reader, "num_samples", None)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.loader), self.world_size))

    def __iter__(self) -> Iterator:
        seen = 0
        for i, (images, labels) in enumerate(self.loader):
            seen += len(labels)
            if i % self.world_size == self.rank:
                yield images, labels
        if self.size and seen != self.size:  # timm's readers leave out what they cannot read
            raise UserError(
                f"the test set gave {seen} images where its description says {self.size}; is a file damaged?"
            )


def create_data(cfg: Config, world: World, train: bool = True) -> Data:
    """The loaders that `cfg` describes.

    Raises:
        UserError: the data set is not what `cfg` says (see `create_dataset`), its training and test set have
            different classes, a batch is larger than the set, or timm does not know the augmentation.
    """
    test_set = create_dataset(cfg, train=False)
    mean, std = cfg.mean or timm.data.IMAGENET_DEFAULT_MEAN, cfg.std or timm.data.IMAGENET_DEFAULT_STD
    common = {
        "input_size": (cfg.in_channels, cfg.input_size, cfg.input_size),
        "mean": mean,
        "std": std,
        "interpolation": cfg.interpolation,
        "device": world.device,
        **worker_settings(cfg, world),
    }
    names = class_names(test_set)
    mixup = create_mixup(cfg) if train else None
    return Data(
        train=_train_loader(cfg, world, names, mixup, dict(common)) if train else None,
        test=_test_loader(cfg, world, test_set, common),
        classes=_readable(names) or [str(i) for i in range(cfg.num_classes)],
        mixup=mixup,
        augment=_erasing(cfg, world) if train else None,
        show=functools.partial(pictures.of_image, mean, std),
    )


def _readable(names: list[str]) -> list[str]:
    """The names, with what WordNet calls ImageNet's classes in place of their numbers."""
    if not is_imagenet(names):
        return names
    imagenet = timm.data.ImageNetInfo()
    return [imagenet.label_name_to_description(name).split(",")[0] for name in names]


def _test_loader(cfg: Config, world: World, dataset: Dataset, common: dict) -> Iterable:
    batch_size = cfg.eval_batch_size or cfg.batch_size
    crop_pct = cfg.crop_pct or (0.875 if cfg.input_size <= 224 else 1.0)  # as the released ImageNet code
    is_stream = isinstance(dataset, IterableDataset)
    if not is_stream:
        dataset = Shard(dataset, batch_size, world.rank, world.world_size)
    loader = _create_loader(dataset, batch_size=batch_size, crop_pct=crop_pct, **common)
    return _Turns(loader, world.rank, world.world_size) if is_stream else loader


def _erasing(cfg: Config, world: World) -> RandomErasing | None:
    if not cfg.reprob:
        return None
    return RandomErasing(cfg.reprob, mode=cfg.remode, max_count=cfg.recount, device=world.device)


def _train_loader(cfg: Config, world: World, test_classes: list[str], mixup: object, common: dict) -> TrainLoader:
    dataset = create_dataset(cfg, train=True)
    if different := set(class_names(dataset)) ^ set(test_classes):
        raise UserError(f"{cfg.dataset}: only one of training and test set has the class {min(different)}")
    require_batches(cfg, world, len(dataset))
    common["num_workers"] = _feedable(dataset, common["num_workers"], world.world_size)
    common["persistent_workers"] = False  # started anew each epoch, they hear of its number and of the end of mixup
    is_stream = isinstance(dataset, IterableDataset)
    try:
        loader = _create_loader(
            dataset if is_stream else Seeded(dataset, cfg.seed),
            batch_size=cfg.batch_size,
            is_training=True,
            scale=cfg.scale,
            ratio=cfg.ratio,
            hflip=cfg.hflip,
            color_jitter=cfg.color_jitter,
            auto_augment=cfg.auto_augment,
            collate_fn=mixup if cfg.mixup_in == "loader" else None,
            distributed=world.world_size > 1,
            **common,
        )
    except (AssertionError, KeyError, ValueError, IndexError):
        if not cfg.auto_augment:
            raise
        raise UserError(f"auto_augment = {cfg.auto_augment!r}: timm has no such policy") from None
    if world.world_size > 1 and not is_stream:
        loader.sampler.seed = cfg.seed  # timm leaves it at 0
    return TrainLoader(loader)


def _create_loader(dataset: Dataset, **settings) -> Iterable:
    """timm's, whose batches are made of numpy's arrays: the same bytes as of tensors, which take longer to handle."""
    loader = timm.data.create_loader(dataset, **settings)
    dataset.transform.transforms[-1] = ToNumpy()
    return loader


def _feedable(dataset: Dataset, workers: int, world_size: int) -> int:
    """As many loader processes as can have a shard each, of data in shards; else `workers`."""
    shards = len(getattr(getattr(getattr(dataset, "reader", None), "split_info", None), "filenames", ()))
    if not shards:
        return workers
    if shards < world_size:
        raise UserError(f"{world_size} processes cannot share {shards} shards: make more, or start fewer processes")
    return min(workers, shards // world_size)
