"""Static images, through timm's transforms and mixup.

Batches are (images [B,C,H,W] float32, normalised, on the device; labels [B] int64, or [B,classes] under mixup).

To add a data set, write a function (cfg, train) -> data set of (PIL image, label) with torchvision's attributes
`transform`, `target_transform` and `classes`, and name it in `DATASETS`.
"""

import filecmp
import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ToNumpy
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms.functional import normalize

from .. import world as distributed
from ..cli import UserError, short
from ..config import Config
from ..log import logger
from ..world import World
from . import pictures
from .digits import Digits
from .folders import data_path, find_classes, is_hidden, split_folders
from .loaders import Data, Seeded, create_loader, create_mixup
from .recordings import EVENT_DATASETS

# Pillow goes by the content of a file, whatever its name, and starts Ghostscript for PostScript
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
SKIPPED = (".gif", ".avif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".tga")  # formats that are not read
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name
IMAGENET_SIZES = {"train": 1_281_167, "test": 50_000}


def create_data(cfg: Config, world: World, train: bool = True) -> Data:
    """Create the loaders of the images that `cfg` describes."""
    test_set = create_dataset(cfg, train=False)
    mean, std = statistics(cfg)
    for key in ("split_seed", "sensor_size"):
        if getattr(cfg, key) is not None:
            raise UserError(
                f"{key} = {getattr(cfg, key)}: is for event recordings, not for {cfg.dataset}; leave it out"
            )
    names = class_names(test_set)
    test_set.transform = _transform(cfg, train=False)
    test = create_loader(cfg, world, test_set, False, fast_collate, mean, std)
    show = functools.partial(pictures.of_image, mean, std)
    classes = _in_words(names) or [str(i) for i in range(cfg.num_classes)]
    if not train:
        return Data(None, test, classes, None, show)

    train_set = create_dataset(cfg, train=True)
    if different := set(class_names(train_set)) ^ set(names):
        raise UserError(f"{cfg.dataset}: only one of training and test set has the class {min(different)}; complete it")
    train_set.transform = _transform(cfg, train=True)
    if not isinstance(train_set, IterableDataset):
        train_set = Seeded(train_set, cfg.seed)
    mixup, erasing = create_mixup(cfg), None
    collate = mixup if mixup and cfg.mixup_in == "loader" else fast_collate
    if cfg.reprob:
        erasing = RandomErasing(cfg.reprob, mode=cfg.remode, max_count=cfg.recount, device=world.device)
    return Data(create_loader(cfg, world, train_set, True, collate, mean, std), test, classes, mixup, show, erasing)


def _transform(cfg: Config, train: bool) -> object:
    """Return timm's transform from a PIL image to uint8 [C,H,W]."""
    settings = {
        "interpolation": cfg.interpolation,
        "mean": statistics(cfg)[0],
        "use_prefetcher": True,
        "is_training": train,
    }
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
    transform.transforms.insert(0, functools.partial(read_image, mode=_mode(cfg), name=cfg.dataset))
    transform.transforms[-1] = ToNumpy()  # collates faster than timm's tensor
    return transform


def create_dataset(cfg: Config, train: bool) -> Dataset:
    """Return the training or the test set of images that `cfg` names; it and its samples raise `UserError`."""
    dataset = DATASETS.get(cfg.dataset, _of_timm)(cfg, train)
    names = class_names(dataset)
    if names and len(names) != cfg.num_classes:
        root = getattr(dataset, "root", cfg.dataset)
        raise UserError(f"num_classes = {cfg.num_classes}: {root} has {len(names)}; complete it, or use --num-classes")
    dataset.target_transform = functools.partial(_require_label, cfg)
    return dataset


def _require_label(cfg: Config, label: object) -> object:
    if not isinstance(label, (int, np.integer)) or not 0 <= label < cfg.num_classes:
        raise UserError(f"{cfg.dataset}: label {short(label)} is not 0 to {cfg.num_classes - 1}; use --num-classes")
    return label


def class_names(dataset: Dataset) -> list[str]:
    """Return names in the order of the labels; none if the data set does not list them."""
    if hasattr(dataset, "classes"):
        return [name if isinstance(name, str) else name[0] for name in dataset.classes]  # torch/imagenet has synonyms
    indices = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    return sorted(indices, key=indices.get)


def is_imagenet(names: list[str]) -> bool:
    """Compare the names with the WordNet numbers of ImageNet-1k's classes."""
    return len(names) == 1000 and names == timm.data.ImageNetInfo().label_names()


def _in_words(names: list[str]) -> list[str]:
    """Replace ImageNet's WordNet numbers."""
    describe = timm.data.ImageNetInfo().label_name_to_description
    return [describe(name).split(",")[0] for name in names] if is_imagenet(names) else names


def read_image(source: object, mode: str = "RGB", name: str | None = None) -> Image.Image:
    """Return an image in the mode "L" or "RGB"; values of 16 bits are divided by 256, where Pillow would clip them.

    `source` is a path, an open file or a Pillow image; `name` is for errors (UserError) if it is no path.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF data, palettes, and sizes that Pillow reads nevertheless
            image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode} has no largest value; save it with 8 or 16 bits")
            image.load()  # here, where its errors get a name
            return image if image.mode == mode else image.convert(mode)
    except Exception as error:  # a damaged file makes decoders fail in any way
        raise UserError(f"{name or source}: unusable image ({error}); replace or remove it") from None


def read_tensor(path: Path, cfg: Config) -> Tensor:
    """Return the image in a file as the network of `cfg` sees it in an evaluation: [C,H,W] float32, normalised."""
    mean, std = (255 * np.array(values, np.float32) for values in statistics(cfg))
    pixels = _transform(cfg, train=False)(read_image(path, _mode(cfg)))
    return normalize(torch.from_numpy(pixels).float(), mean.tolist(), std.tolist())


def statistics(cfg: Config) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation of each channel, for pixels from 0 to 1."""
    mean, std = cfg.mean or timm.data.IMAGENET_DEFAULT_MEAN, cfg.std or timm.data.IMAGENET_DEFAULT_STD
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != cfg.in_channels:
            raise UserError(f"{key} = {values}: needs one number per channel (in_channels = {cfg.in_channels})")
    return mean, std


def _mode(cfg: Config) -> str:
    if cfg.in_channels not in MODES:
        raise UserError(f"in_channels = {cfg.in_channels}: images have 1 or 3; use --in-channels")
    return MODES[cfg.in_channels]


class _ImageFolder(ImageFolder):
    """torchvision's, without the folders that systems and editors add."""

    find_classes = staticmethod(find_classes)


def _image_folder(cfg: Config, train: bool) -> ImageFolder:
    """Return the training or the test part of a folder, with a folder per class in each."""
    part, root, skipped = "train" if train else "test", data_path(cfg), []
    folders = split_folders(root)
    if part not in folders:
        raise UserError(f"{root}: no folder {'train' if train else 'val'}; make both, each with a folder per class")

    def is_image(path: str) -> bool:
        if not is_hidden(path[len(str(root)) :]) and path.lower().endswith(SKIPPED):
            skipped.append(path)
        return not is_hidden(path[len(str(root)) :]) and path.lower().endswith(IMG_EXTENSIONS)

    folder, loader = folders[part], functools.partial(read_image, mode=_mode(cfg))
    try:
        dataset = _ImageFolder(str(folder), loader=loader, is_valid_file=is_image)
    except FileNotFoundError as error:
        reason = str(error).partition(". Supported")[0].rstrip(". ")
        raise UserError(f"{folder}: {reason}; add images (for recordings use --dataset eventfolder)") from None
    if skipped:
        count = f"{len(skipped):,} images are skipped, such as {skipped[0]}"
        logger.warning(f"warning: {folder}: {count}; convert them to PNG or JPEG")
    if is_imagenet(dataset.classes) and len(dataset) != (size := IMAGENET_SIZES[part]):
        logger.warning(f"warning: {folder}: {len(dataset):,} of {size:,} images; extract its archive again")
    if train and "test" in folders:
        test = make_dataset(str(folders["test"]), dataset.class_to_idx, is_valid_file=is_image, allow_empty=True)
        _warn_of_copies(dataset.samples, test)
    return dataset


def _warn_of_copies(train: Sequence[tuple[str, int]], test: Sequence[tuple[str, int]], most: int = 64) -> None:
    """Look for some test images in the same class of the training set, by their names and bytes."""
    test = test[:: -(-len(test) // most) or 1]
    wanted = {(os.path.basename(path), label): path for path, label in test}
    pairs = [(path, wanted.get((os.path.basename(path), label))) for path, label in train]
    copies = [path for path, other in pairs if other and filecmp.cmp(path, other, shallow=False)]
    if copies:
        count = f"{len(copies)} of {len(test)} test images compared"
        logger.warning(f"warning: {count} are training images too, such as {copies[0]}; keep them apart")


def _of_timm(cfg: Config, train: bool) -> Dataset:
    """Return a data set of torchvision (`torch/`), of WebDataset shards (`wds/`) or of Hugging Face (`hfds/`)."""
    kind = cfg.dataset.lower().split("/")[0]
    if kind not in ("torch", "wds", "hfds") or "/" not in cfg.dataset:
        known = ", ".join([*DATASETS, *EVENT_DATASETS])
        raise UserError(f"dataset = {cfg.dataset!r}: unknown; use {known}, torch/NAME, wds/NAME or hfds/NAME")
    # shards are files of a folder here: under an address like pipe:COMMAND, their names would be commands
    root = cfg.data_path if kind == "hfds" else str(data_path(cfg, must_exist=not cfg.download))
    split = cfg.train_split if train else cfg.val_split
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of readers that open images

    def make() -> Dataset:
        try:
            return timm.data.create_dataset(
                cfg.dataset,
                root,
                split,
                is_training=train,
                download=cfg.download,
                batch_size=cfg.batch_size,
                seed=cfg.seed,
                input_img_mode="",  # `_transform` converts
            )
        except Exception as error:  # each library fails in its own way
            raise UserError(f"{cfg.dataset} in {root}: {error!r}; use --data-path, or --download") from None

    dataset = distributed.in_turns(make) if cfg.download else make()
    if train and type(dataset) is ImageFolder and dataset.root == root:  # what timm falls back to
        raise UserError(f"{root}: no folder {split}; make one for training and one for testing")
    if hasattr(dataset, "loader"):
        dataset.loader = functools.partial(read_image, mode=_mode(cfg))
    if not train and isinstance(dataset, IterableDataset):
        # on several ranks timm's stream would repeat or skip samples; here each rank reads all and keeps its share
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
    return dataset


DATASETS = {"digits": lambda cfg, train: Digits(train), "imagefolder": _image_folder}
