"""Image data sets by name: the embedded digits, folders of images, and whatever timm's `create_dataset` knows."""

import filecmp
import functools
import glob
import importlib.metadata
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import timm.data
import torchvision.datasets
import torchvision.datasets.cifar
from PIL import Image
from timm.data.readers import reader_wds
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import check_integrity

from .. import world
from ..cli import UserError
from ..config import EVENT_DATASETS, Config
from ..log import logger
from . import pickles

# Pillow goes by the content of a file, whatever its name, and hands PostScript to Ghostscript, which runs it. All who
# read images in this process, timm and Hugging Face too, read these formats alone.
Image.open = functools.partial(Image.open, formats=("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"))
torchvision.datasets.cifar.pickle = pickles

IMAGENET_SIZES = {"train": 1_281_167, "val": 50_000}
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "test")}


def create_dataset(cfg: Config, train: bool) -> Dataset:
    """The training or the test set that `cfg` names; one of timm's may be iterable.

    Raises:
        UserError: it is unknown, missing or incomplete, a package for it is not installed, or it has not
            `num_classes` classes or `in_channels` channels, or its training images are those to test with. Its samples
            raise it where one cannot be read, or the network has no output for a label.
    """
    if cfg.dataset == "digits":
        dataset = Digits(train)
    elif cfg.dataset == "imagefolder":
        dataset = _image_folder(cfg, "train" if train else "val")
    else:
        dataset = _of_timm(cfg, train)
    channels = getattr(dataset, "channels", None)
    if channels and channels != cfg.in_channels:
        raise UserError(f"in_channels = {cfg.in_channels}: {cfg.dataset} has {channels}")
    names = class_names(dataset)
    if names and len(names) != cfg.num_classes:
        where = getattr(dataset, "root", cfg.dataset)
        raise UserError(
            f"num_classes = {cfg.num_classes}: {where} has {len(names)} classes; "
            "complete the data set, or choose --num-classes"
        )
    dataset.target_transform = functools.partial(_require_label, cfg)
    return dataset


def _require_label(cfg: Config, label: object) -> object:
    """The label, if the network has an output for it."""
    is_number = isinstance(label, (int, np.integer)) and abs(label) < 2**63
    if not is_number or not 0 <= label < cfg.num_classes:
        what = label if is_number else f"of type {type(label).__name__}"
        raise UserError(
            f"{cfg.dataset}: a label {what}, where num_classes = {cfg.num_classes} wants 0 to {cfg.num_classes - 1}; "
            "choose --num-classes or a split that has labels, or correct the data set"
        )
    return label


def class_names(dataset: Dataset) -> list[str]:
    """Names in the order of the labels, none where the data set does not tell."""
    if hasattr(dataset, "classes"):
        return [name if isinstance(name, str) else name[0] for name in dataset.classes]  # torch/imagenet has synonyms
    indices = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    return sorted(indices, key=indices.get)


def is_imagenet(names: list[str]) -> bool:
    """Whether these are the classes of ImageNet-1k, by their WordNet numbers."""
    return len(names) == 1000 and names == timm.data.ImageNetInfo().label_names()


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


def read_image(file, mode: str = "RGB", name: str | None = None) -> Image.Image:
    """The image in `file` (a path, or an open file called `name`).

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")  # Pillow's about EXIF data and palettes: they harm nobody
            return image.convert(mode)
    except Exception as error:  # a damaged file makes decoders fail in any way
        raise UserError(
            f"{name or file}: cannot be read as an image ({error}); fetch it again or take it out"
        ) from None


def _image_folder(cfg: Config, split: str) -> ImageFolder:
    root = _data_path(cfg)
    mode = {1: "L", 3: "RGB"}.get(cfg.in_channels)
    if mode is None:
        raise UserError(f"in_channels = {cfg.in_channels}: images of a folder have 3, or 1 when read as grey")
    folders = {
        part: next((root / name for name in names if (root / name).is_dir()), None)
        for part, names in SPLIT_FOLDERS.items()
    }
    folder = folders[split]
    if folder is None:
        if glob.glob("ILSVRC2012_*.tar", root_dir=root):
            extract = f"python -c \"from torchvision.datasets import ImageNet as I; I('{root}', '{split}')\""
            raise UserError(f"{root} holds archives of ImageNet and no folder {split}; extract them: {extract}")
        raise UserError(f"{root} holds no folder {split}; it should hold train and val, each with a folder per class")
    if all(folders.values()):
        _require_apart(**folders)
    try:
        dataset = ImageFolder(str(folder), loader=functools.partial(read_image, mode=mode))
    except FileNotFoundError as error:
        empty = re.search(r"for the classes (.+?)\. Supported", str(error))
        if empty:
            raise UserError(f"{folder}: no images in {_first(empty[1].split(', '))}; complete the data set") from None
        images = sum(path.suffix.lower() in IMG_EXTENSIONS for path in folder.iterdir())
        raise UserError(f"{folder} holds {images} images but no folder per class; sort them into such") from None
    if is_imagenet(dataset.classes) and len(dataset) != IMAGENET_SIZES[split]:
        logger.warning(
            f"{folder}: {len(dataset):,} images where ImageNet-1k has {IMAGENET_SIZES[split]:,}; fully extracted?"
        )
    if split == "train" and folders["val"]:
        _warn_of_copies(dataset, folders["val"])
    return dataset


def _require_apart(train: Path, val: Path) -> None:
    real, other = train.resolve(), val.resolve()
    if real.is_relative_to(other) or other.is_relative_to(real):
        how = "are one folder" if real == other else "lie one in the other"
        raise UserError(f"{train} and {val} {how}: keep the images to test with apart from those to train with")


def _warn_of_copies(train: ImageFolder, val: Path, most: int = 64) -> None:
    """Look for some images of the folder `val` in the same class of the training set, by their names and bytes."""
    images = make_dataset(str(val), train.class_to_idx, IMG_EXTENSIONS, allow_empty=True)
    images = images[:: -(-len(images) // most) or 1]
    wanted = {(Path(path).name, label): path for path, label in images}
    copies = [
        path
        for path, label in train.samples
        if (other := wanted.get((path.rpartition(os.sep)[2], label))) and filecmp.cmp(path, other, shallow=False)
    ]
    if copies:
        logger.warning(
            f"warning: {len(copies)} of {len(images)} images of {val} that were looked at are training images too, "
            f"such as {copies[0]}; what is measured with them is too good"
        )


def _data_path(cfg: Config) -> Path:
    if cfg.data_path is None:
        raise UserError(f"dataset {cfg.dataset}: say where it is with --data-path")
    root = Path(cfg.data_path)
    if not root.is_dir() and not cfg.download:
        raise UserError(f"data folder {root} does not exist; say where {cfg.dataset} is with --data-path")
    return root


def _first(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _damaged_file(cfg: Config) -> str | None:
    """The first file of CIFAR that is missing or not as published, and what to do."""
    kind = getattr(torchvision.datasets, cfg.dataset.split("/")[1].upper(), None)
    for name, md5 in [*getattr(kind, "train_list", ()), *getattr(kind, "test_list", ())]:
        path = Path(cfg.data_path) / kind.base_folder / name
        if not check_integrity(path, md5):
            state = "is damaged" if path.exists() else "is missing"
            return f"{path} {state}; fetch it anew with --download, or say with --data-path where it is"
    return None


def _require_sound(dataset: Dataset) -> None:
    """Raise `ValueError` where what torchvision has read into memory is not what it is taken for."""
    if hasattr(dataset, "data"):
        images = np.asarray(dataset.data)
        is_sound = images.dtype == np.uint8 and images.size and len(images) == len(dataset.targets)
        if not is_sound or not all(isinstance(name, str) for name in dataset.classes):
            raise ValueError("its images, labels or names are damaged")


class _HuggingFace(timm.data.ImageDataset):
    """timm's, which replaces an image that cannot be read by the next one, made to name it."""

    def __getitem__(self, index: int) -> tuple[object, int]:
        file, label = self.reader[index]
        image = read_image(file, self.input_img_mode, f"image {index} of {self.reader.split}")
        return (self.transform(image) if self.transform else image), self.target_transform(label)


class _Stream(timm.data.IterableImageDataset):
    """timm's, which leaves out what cannot be read in shards, made to end there."""

    def __iter__(self) -> Iterator[tuple[object, int]]:
        try:
            yield from super().__iter__()
        except UserError:
            raise
        except Exception as error:  # libraries and decoders fail in any way
            raise UserError(f"a sample of the shards cannot be read ({error}); make the shard anew") from None


def _decode_shard(sample: dict, **settings) -> dict | None:
    try:
        return _decode(sample, **settings)
    except Exception as error:
        raise ValueError(f"{sample['__key__']} in {sample['__url__']}: {error}") from None


def _raise(error: Exception) -> NoReturn:
    raise error


_decode = reader_wds._decode
reader_wds._decode, reader_wds.log_and_continue = _decode_shard, _raise


def _require_shards(split: reader_wds.SplitInfo) -> None:
    """Raise `ValueError` for names that are no mere files: under an address that runs a command they are part of it."""
    for name in split.filenames:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+=@,-][\w.+=@,/ -]*", name) or ".." in Path(name).parts:
            raise ValueError(f"{name!r} is no shard of the folder")
    if not isinstance(split.num_samples, int) or not 0 <= split.num_samples < 2**40:
        raise ValueError("_info.json has no num_samples")


def _require_no_scripts() -> None:
    """Raise `ValueError` where Hugging Face's package is one that runs the scripts of data sets."""
    try:
        version = importlib.metadata.version("datasets")
    except importlib.metadata.PackageNotFoundError:
        return  # timm says what to install
    if int(version.split(".")[0]) < 4:
        raise ValueError(f"datasets {version} runs code that comes with the data; pip install -U datasets")


def _of_timm(cfg: Config, train: bool) -> Dataset:
    """torchvision's data sets (`torch/`), WebDataset shards (`wds/`), Hugging Face (`hfds/`), TFDS (`tfds/`)."""
    kind = cfg.dataset.split("/")[0].lower()
    if kind not in ("torch", "wds", "hfds", "hfids", "tfds") or "/" not in cfg.dataset:
        raise UserError(
            f"dataset = {cfg.dataset!r}: choose digits, imagefolder, {', '.join(EVENT_DATASETS)}, or one of timm's: "
            "torch/cifar10, wds/NAME, hfds/NAME, tfds/NAME"
        )
    if kind == "torch":
        _data_path(cfg)
    split = cfg.train_split if train else cfg.val_split
    mode = "L" if cfg.in_channels == 1 else "RGB"
    if kind == "torch":
        make = functools.partial(timm.data.create_dataset, cfg.dataset, cfg.data_path, split, download=cfg.download)
    elif kind == "hfds":
        make = functools.partial(_HuggingFace, cfg.data_path, cfg.dataset, split, input_img_mode=mode)
    else:
        make = functools.partial(
            _Stream,
            cfg.data_path,
            cfg.dataset,
            split,
            is_training=train,
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            download=cfg.download,
            input_img_mode=mode,
        )

    def attempt() -> Dataset:
        try:
            if kind in ("hfds", "hfids"):
                _require_no_scripts()
            dataset = make()
            _require_sound(dataset)
            if kind == "wds":
                _require_shards(dataset.reader.split_info)
            return dataset
        except Exception as error:  # what is not there, packages and files, in as many ways as there are libraries
            damaged = kind == "torch" and not cfg.download and _damaged_file(cfg)
            is_plain = str(error) and not isinstance(error, (LookupError, TypeError, AttributeError))
            reason = damaged or (str(error) if is_plain else f"is a file damaged? {error!r}")
            raise UserError(f"dataset {cfg.dataset} in {cfg.data_path}: {reason}") from None

    dataset = world.in_turns(attempt) if cfg.download else attempt()
    if train and type(dataset) is ImageFolder and Path(dataset.root) == Path(cfg.data_path):  # what timm falls back to
        raise UserError(f"{dataset.root} holds no folder {split}; it should hold one for training and one for testing")
    if hasattr(dataset, "loader"):
        dataset.loader = functools.partial(read_image, mode=mode)
    elif kind == "torch" and len(dataset[0][0].getbands()) != cfg.in_channels:
        raise UserError(f"in_channels = {cfg.in_channels}: {cfg.dataset} has {len(dataset[0][0].getbands())}")
    reader = getattr(dataset, "reader", None)
    if not train and hasattr(reader, "dist_num_replicas"):
        # in a distributed evaluation timm's streaming readers repeat or leave out samples; here all processes read
        # everything and take the batches in turn
        reader.dist_rank, reader.dist_num_replicas = 0, 1
    return dataset
