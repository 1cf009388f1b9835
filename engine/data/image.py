"""Static images, through timm's transforms and mixup.

Batches are (images [B,C,H,W] float32, normalised, on the device; labels [B] int64, or [B,classes] under mixup).

To add a data set, write a function (cfg, train) -> data set of (PIL image, label) with torchvision's attributes
`transform`, `target_transform` and `classes`, and name it in `DATASETS`.
"""

import contextlib
import filecmp
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm.data
from PIL import Image
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ToNumpy
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from .. import world as distributed
from ..cli import UserError, short
from ..config import Config
from ..log import logger
from ..world import World
from . import pictures
from .digits import Digits
from .folders import class_folders, data_path, is_hidden, split_folders
from .loaders import Data, Seeded, create_loader, create_mixup
from .recordings import EVENT_DATASETS

# Pillow goes by the content of a file, whatever its name, and starts Ghostscript for PostScript
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
SKIPPED = (".gif", ".avif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".tga")  # images with names of no image
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name
IMAGENET_SIZES = {"train": 1_281_167, "test": 50_000}


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
    classes = _in_words(names) or [str(i) for i in range(cfg.num_classes)]
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
    transform.transforms.insert(0, functools.partial(to_mode, cfg.dataset, _mode(cfg)))
    transform.transforms[-1] = ToNumpy()  # collates faster than timm's tensor
    return transform


def create_dataset(cfg: Config, train: bool) -> Dataset:
    """Return the training or the test set of images that `cfg` names.

    Raises:
        UserError: the data set is unknown, missing or incomplete, its package is not installed, its classes are
            not those of `cfg`, or it tests on training images. Samples raise it for an unreadable image or a label
            without an output.
    """
    dataset = DATASETS.get(cfg.dataset, _of_timm)(cfg, train)
    names = class_names(dataset)
    if names and len(names) != cfg.num_classes:
        root = getattr(dataset, "root", cfg.dataset)
        raise UserError(f"num_classes = {cfg.num_classes}: {root} has {len(names)}; complete it, or use --num-classes")
    dataset.target_transform = functools.partial(_require_label, cfg)
    return dataset


def _require_label(cfg: Config, label: object) -> object:
    """Return the label, if the network has an output for it."""
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
    imagenet = timm.data.ImageNetInfo()
    return [imagenet.label_name_to_description(n).split(",")[0] for n in names] if is_imagenet(names) else names


@contextlib.contextmanager
def _naming(file: object) -> Iterator[None]:
    """Raise errors of Pillow, of any kind, as UserError with the name of the image; silence its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF data, palettes, and sizes that it reads nevertheless
            yield
    except Exception as error:
        raise UserError(f"{file}: unusable image ({error}); replace or remove it") from None


def read_image(file: object, mode: str = "RGB") -> Image.Image:
    """Return the image in `file`, a path or an open file; an unusable one raises UserError with its name."""
    with _naming(file):
        image = Image.open(file, formats=FORMATS)
    with image:
        return to_mode(file, mode, image)


def to_mode(name: object, mode: str, image: Image.Image) -> Image.Image:
    """Convert an image to "L" or "RGB". Values of 16 bits are divided by 256; Pillow would clip them."""
    with _naming(name):
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"mode {image.mode} has no largest value; save it with 8 or 16 bits")
        return image.convert(mode)


def _mode(cfg: Config) -> str:
    if cfg.in_channels not in MODES:
        raise UserError(f"in_channels = {cfg.in_channels}: images have 1 or 3; use --in-channels")
    return MODES[cfg.in_channels]


class _ImageFolder(ImageFolder):
    """torchvision's, without the files and folders that systems and editors add."""

    def __init__(self, folder: Path, mode: str):
        skipped = []
        is_image = functools.partial(_is_image, str(folder), skipped)
        super().__init__(str(folder), loader=functools.partial(read_image, mode=mode), is_valid_file=is_image)
        if skipped:
            count = f"{len(skipped):,} images are skipped, such as {skipped[0]}"
            logger.warning(f"warning: {folder}: {count}; convert them to PNG or JPEG")

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = class_folders(Path(directory))
        return names, {name: label for label, name in enumerate(names)}


def _is_image(folder: str, skipped: list[str], path: str) -> bool:
    """Tell by its name if a file is an image; note images of other formats in `skipped`."""
    if is_hidden(path[len(folder) :]):
        return False
    if path.lower().endswith(SKIPPED):
        skipped.append(path)
    return path.lower().endswith(IMG_EXTENSIONS)


def _image_folder(cfg: Config, train: bool) -> ImageFolder:
    """Return the training or the test part of a folder, with a folder per class in each."""
    part, root = "train" if train else "test", data_path(cfg)
    folders = split_folders(root)
    if part not in folders:
        raise UserError(f"{root}: no folder {part}; make train and val, each with a folder per class")
    folder = folders[part]
    try:
        dataset = _ImageFolder(folder, _mode(cfg))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {error}; complete the data set, with a folder per class") from None
    if is_imagenet(dataset.classes) and len(dataset) != (size := IMAGENET_SIZES[part]):
        logger.warning(f"warning: {folder}: {len(dataset):,} of {size:,} images; extract its archive again")
    if train and "test" in folders:
        _warn_of_copies(dataset, folders["test"])
    return dataset


def _warn_of_copies(train: ImageFolder, val: Path, most: int = 64) -> None:
    """Look for some images of the folder `val` in the same class of the training set, by their names and bytes."""
    is_image = functools.partial(_is_image, str(val), [])
    images = make_dataset(str(val), train.class_to_idx, is_valid_file=is_image, allow_empty=True)
    images = images[:: -(-len(images) // most) or 1]
    wanted = {(os.path.basename(path), label): path for path, label in images}
    copies = [
        path
        for path, label in train.samples
        if (other := wanted.get((os.path.basename(path), label))) and filecmp.cmp(path, other, shallow=False)
    ]
    if copies:
        count = f"{len(copies)} of {len(images)} images compared"
        logger.warning(f"warning: {val}: {count} are training images too, such as {copies[0]}; keep them apart")


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
