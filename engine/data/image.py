"""Static images, through timm's transforms and mixup; data sets are in datasets.py, loaders in loaders.py.

Batches are (images [B,C,H,W] float32, normalised, on the device; labels [B] int64, or [B,classes] under mixup).
"""

import functools

import timm.data
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ToNumpy
from torch.utils.data import IterableDataset

from ..cli import UserError
from ..config import Config
from ..world import World
from . import pictures
from .datasets import class_names, create_dataset, is_imagenet
from .loaders import Data, Seeded, create_loader, create_mixup


def create_data(cfg: Config, world: World, train: bool = True) -> Data:
    """Create the loaders of the images that `cfg` describes."""
    mean, std = cfg.mean or timm.data.IMAGENET_DEFAULT_MEAN, cfg.std or timm.data.IMAGENET_DEFAULT_STD
    test_set = create_dataset(cfg, train=False)
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != cfg.in_channels:
            raise UserError(f"{key} = {values}: needs one number per channel (in_channels = {cfg.in_channels})")
    if cfg.split_seed is not None:
        raise UserError(f"split_seed = {cfg.split_seed}: {cfg.dataset} is not split here; leave it out")
    names = class_names(test_set)
    test_set.transform = _transform(cfg, mean, train=False)
    test = create_loader(cfg, world, test_set, False, fast_collate, mean, std)
    show = functools.partial(pictures.of_image, mean, std)
    classes = _readable(names) or [str(i) for i in range(cfg.num_classes)]
    if not train:
        return Data(None, test, classes, None, show)

    train_set = create_dataset(cfg, train=True)
    if different := set(class_names(train_set)) ^ set(names):
        raise UserError(f"{cfg.dataset}: only one of training and test set has the class {min(different)}; complete it")
    train_set.transform = _transform(cfg, mean, train=True)
    if not isinstance(train_set, IterableDataset):
        train_set = Seeded(train_set, cfg.seed)
    mixup, erasing = create_mixup(cfg), None
    collate = mixup if mixup and cfg.mixup_in == "loader" else fast_collate
    if cfg.reprob:
        erasing = RandomErasing(cfg.reprob, mode=cfg.remode, max_count=cfg.recount, device=world.device)
    return Data(create_loader(cfg, world, train_set, True, collate, mean, std), test, classes, mixup, show, erasing)


def _transform(cfg: Config, mean: tuple[float, ...], train: bool) -> object:
    """Return timm's transform from a PIL image to uint8 [C,H,W]."""
    settings = {"interpolation": cfg.interpolation, "mean": mean, "use_prefetcher": True, "is_training": train}
    if train:
        names = ("scale", "ratio", "hflip", "color_jitter", "auto_augment")
        settings |= {name: getattr(cfg, name) for name in names}
    else:  # the default is that of the released ImageNet code
        settings["crop_pct"] = cfg.crop_pct or (0.875 if cfg.input_size <= 224 else 1.0)
    try:
        transform = timm.data.create_transform((cfg.in_channels, cfg.input_size, cfg.input_size), **settings)
    except (AssertionError, KeyError, ValueError, IndexError):
        if not cfg.auto_augment:
            raise
        raise UserError(f"auto_augment = {cfg.auto_augment!r}: unknown policy; see timm's auto_augment.py") from None
    transform.transforms[-1] = ToNumpy()  # collates faster than timm's tensor
    return transform


def _readable(names: list[str]) -> list[str]:
    """Replace ImageNet's WordNet numbers by words."""
    if not is_imagenet(names):
        return names
    imagenet = timm.data.ImageNetInfo()
    return [imagenet.label_name_to_description(name).split(",")[0] for name in names]
