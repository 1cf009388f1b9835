"""Static images, through timm's transforms and mixup.

Batches are (images [B,C,H,W] float32, normalised, on the device; labels [B] int64, or [B,classes] with mixup).
To add a data set, write a function (cfg, train) -> data set of (PIL image or path, label) with torchvision's
attributes `transform`, `target_transform` and `classes`, and name it in `DATASETS`.
"""

import functools
import io
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
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import normalize

from .. import world as distributed
from ..cli import UserError, short
from ..config import Config
from ..log import logger
from ..world import World
from . import pictures
from .digits import Digits
from .folders import data_path, find_classes, is_hidden, part_folder, require, require_classes, require_equal_classes
from .loaders import Data, Seeded, create_loader, create_mixup
from .recordings import EVENT_DATASETS

# Pillow recognises files by content, and starts Ghostscript for PostScript under any name
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
SKIPPED = (".gif", ".avif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".tga")  # formats that are not read
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name
IMAGENET_SIZES = {"train": 1_281_167, "test": 50_000}


def create_data(cfg: Config, world: World, train: bool = True) -> Data:
    """Create the loaders of images."""
    test_set, (mean, std) = create_dataset(cfg, train=False), statistics(cfg)
    train_set, names = create_dataset(cfg, train=True) if train else test_set, class_names(test_set)
    require_equal_classes(cfg.data_path or cfg.dataset, class_names(train_set), names)
    if names:
        require_classes(cfg, len(names), getattr(test_set, "root", cfg.dataset), train)
    test = create_loader(cfg, world, test_set, False, fast_collate, mean, std)
    show = functools.partial(pictures.of_image, mean, std)
    classes = [imagenet_classes().get(name, name) for name in names] or [str(i) for i in range(cfg.num_classes)]
    if not train:
        return Data(None, test, classes, None, show)

    if not isinstance(train_set, IterableDataset):
        train_set = Seeded(train_set, cfg.seed)
    mixup, erasing = create_mixup(cfg), None
    collate = mixup if mixup and cfg.mixup_in == "loader" else fast_collate
    if cfg.reprob:
        erasing = RandomErasing(cfg.reprob, mode=cfg.remode, max_count=cfg.recount, device=world.device)
    return Data(create_loader(cfg, world, train_set, True, collate, mean, std), test, classes, mixup, show, erasing)


def _transform(cfg: Config, train: bool) -> object:
    """Return timm's transform from a path or a PIL image to uint8 [C,H,W]."""
    settings = {"interpolation": cfg.interpolation, "mean": statistics(cfg)[0]}
    if train:
        names = ("scale", "ratio", "hflip", "color_jitter", "auto_augment")
        settings |= {name: getattr(cfg, name) for name in names}
    else:  # the default is that of the released ImageNet code
        settings["crop_pct"] = cfg.crop_pct or (0.875 if cfg.input_size <= 224 else 1.0)
    try:
        size = (cfg.in_channels, cfg.input_size, cfg.input_size)
        transform = timm.data.create_transform(size, train, use_prefetcher=True, **settings)
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"auto_augment = {cfg.auto_augment!r}: {error!r}; see timm's auto_augment.py") from None
    transform.transforms.insert(0, functools.partial(read_image, mode=MODES[cfg.in_channels], name=cfg.dataset))
    transform.transforms[-1] = ToNumpy()  # collates faster than timm's tensor
    return transform


def create_dataset(cfg: Config, train: bool) -> Dataset:
    """Return the training or the test set of images; it and its samples raise `UserError`."""
    dataset = DATASETS.get(cfg.dataset, _of_timm)(cfg, train)
    dataset.transform, dataset.target_transform = _transform(cfg, train), functools.partial(_require_label, cfg)
    return dataset


def _require_label(cfg: Config, label: object) -> object:
    if not isinstance(label, (int, np.integer)) or not 0 <= label < cfg.num_classes:
        raise UserError(f"{cfg.dataset}: label {short(label)} is not 0 to {cfg.num_classes - 1}; use --num-classes")
    return label


def class_names(dataset: Dataset) -> list[str]:
    """Return the names of the classes in the order of the labels; none if the data set has no names."""
    if hasattr(dataset, "classes"):
        return [name if isinstance(name, str) else name[0] for name in dataset.classes]  # torch/imagenet has synonyms
    indices = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    return sorted(indices, key=indices.get)


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """Return WordNet number -> name of ImageNet-1k's classes, in the order of the labels."""
    descriptions = timm.data.ImageNetInfo().label_descriptions(as_dict=True)
    return {number: description.split(",")[0] for number, description in descriptions.items()}


def read_image(source: object, mode: str = "RGB", name: str | None = None) -> Image.Image:
    """Return an image, of a path, bytes or Pillow, in the mode "L" or "RGB"; `name` is for errors without a path."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF data, palettes, and sizes that Pillow still reads
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            image = source if isinstance(source, Image.Image) else Image.open(file, formats=FORMATS)
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))  # Pillow would clip 16 bits
            if image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode} has no largest value; save it with 8 or 16 bits")
            image.load()  # here, because its errors get a name
            return image if image.mode == mode else image.convert(mode)
    except Exception as error:  # a damaged file makes decoders fail in any way
        where = name if isinstance(source, (Image.Image, bytes)) else source
        raise UserError(f"{where}: unusable image ({error}); replace or remove it") from None


def read_tensor(path: Path, cfg: Config) -> Tensor:
    """Return the image of a file as a network sees it in evaluation: [C,H,W] float32, normalised."""
    mean, std = (255 * np.array(values, np.float32) for values in statistics(cfg))
    return normalize(torch.from_numpy(_transform(cfg, train=False)(path)).float(), mean.tolist(), std.tolist())


def statistics(cfg: Config) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation of each channel, for pixels from 0 to 1."""
    require(cfg, "images", {"in_channels": tuple(MODES), "split_seed": (None,), "sensor_size": (None,)})
    mean, std = cfg.mean or timm.data.IMAGENET_DEFAULT_MEAN, cfg.std or timm.data.IMAGENET_DEFAULT_STD
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != cfg.in_channels:
            raise UserError(f"{key} = {values}: needs one number per channel (in_channels = {cfg.in_channels})")
    return mean, std


class _ImageFolder(ImageFolder):
    """torchvision's data set, without the folders that systems and editors add."""

    find_classes = staticmethod(find_classes)


def _image_folder(cfg: Config, train: bool) -> ImageFolder:
    """Return the training or the test part of a folder, with a folder per class in each."""
    part, root, skipped = "train" if train else "test", data_path(cfg), []
    folder = part_folder(root, part)

    def is_image(path: str) -> bool:
        name = "" if is_hidden(path[len(str(root)) :]) else path.lower()
        if name.endswith(SKIPPED):
            skipped.append(path)
        return name.endswith(IMG_EXTENSIONS)

    try:
        dataset = _ImageFolder(str(folder), loader=str, is_valid_file=is_image)
    except FileNotFoundError as error:
        reason = str(error).partition(". Supported")[0].rstrip(". ")
        raise UserError(f"{folder}: {reason}; add images (for recordings use --dataset eventfolder)") from None
    if skipped:
        count = f"{len(skipped):,} images are skipped, such as {skipped[0]}"
        logger.warning(f"warning: {folder}: {count}; convert them to PNG or JPEG")
    if dataset.classes == [*imagenet_classes()] and len(dataset) != (size := IMAGENET_SIZES[part]):
        logger.warning(f"warning: {folder}: {len(dataset):,} of {size:,} images; extract its archive again")
    return dataset


def _of_timm(cfg: Config, train: bool) -> Dataset:
    """Return a data set of torchvision (`torch/`), of WebDataset shards (`wds/`) or of Hugging Face (`hfds/`)."""
    kind = cfg.dataset.lower().split("/")[0]
    if kind not in ("torch", "wds", "hfds") or "/" not in cfg.dataset:
        known = ", ".join([*DATASETS, *EVENT_DATASETS])
        raise UserError(f"dataset = {cfg.dataset!r}: unknown; use {known}, torch/NAME, wds/NAME or hfds/NAME")
    # only shards in a folder, because the reader runs commands under addresses like pipe:COMMAND
    root = cfg.data_path if kind == "hfds" else str(data_path(cfg, must_exist=not cfg.download))
    split = cfg.train_split if train else cfg.val_split
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of readers that open images
    # batch_size and seed are for shards; `input_img_mode` "" leaves images as they are
    settings = {"is_training": train, "batch_size": cfg.batch_size, "seed": cfg.seed, "input_img_mode": ""}
    make = functools.partial(timm.data.create_dataset, cfg.dataset, root, split, download=cfg.download, **settings)
    try:
        dataset = distributed.in_turns(make) if cfg.download else make()
    except Exception as error:  # each library fails in its own way
        problem = f"{type(error).__name__}: {error}".replace("download=True", "--download")
        fix = "check --data-path, or use --download; folders of images need --dataset imagefolder"
        raise UserError(f"{cfg.dataset} in {root}: {problem}; {fix}") from None
    if train and type(dataset) is ImageFolder and dataset.root == root:  # timm's fallback
        raise UserError(f"{root}: no folder {split}; make one for training and one for testing")
    if hasattr(dataset, "loader"):
        dataset.loader = str  # `_transform` reads
    if hasattr(dataset, "load_bytes"):
        dataset.load_bytes = True  # else timm takes the next image in place of one that it cannot read
    if not train and isinstance(dataset, IterableDataset):
        # each rank reads all and keeps its share, because timm's stream would repeat or skip samples
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
    return dataset


def _digits(cfg: Config, train: bool) -> Digits:
    require(cfg, "scikit-learn's images", {"data_path": (None,)})
    return Digits(train)


DATASETS = {"digits": _digits, "imagefolder": _image_folder}
