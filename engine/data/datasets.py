"""Image data sets by name; event data sets are in event.py.

To add one, write a function (cfg, train) -> data set of (PIL image, label) with torchvision's attributes `transform`,
`target_transform` and `classes`, and name it in `DATASETS`.
"""

import filecmp
import functools
import os
import warnings
from pathlib import Path

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from .. import world
from ..cli import UserError
from ..config import Config, short
from ..log import logger
from .recordings import EVENT_DATASETS

# Pillow goes by the content of a file, whatever its name, and starts Ghostscript for PostScript
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
IMAGENET_SIZES = {"train": 1_281_167, "val": 50_000}
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "test")}


def create_dataset(cfg: Config, train: bool) -> Dataset:
    """Return the training or the test set that `cfg` names, of images in the mode of the network.

    Raises:
        UserError: the data set is unknown, missing or incomplete, its package is not installed, its classes or
            channels are not those of `cfg`, or it tests on training images. Samples raise it for an unreadable image
            or a label without an output.
    """
    dataset = DATASETS.get(cfg.dataset, _of_timm)(cfg, train)
    if not isinstance(dataset, IterableDataset) and (channels := len(dataset[0][0].getbands())) != cfg.in_channels:
        raise UserError(f"in_channels = {cfg.in_channels}: images of {cfg.dataset} have {channels}; use --in-channels")
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


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, shipped inside the package.

    360 of them, a fifth of each class drawn with a fixed seed, are for testing.
    """

    classes = tuple(str(digit) for digit in range(10))

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


def read_image(file: object, mode: str = "RGB") -> Image.Image:
    """Return the image in `file`, a path or an open file; an undecodable one raises UserError with its name."""
    try:
        with warnings.catch_warnings(), Image.open(file, formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # Pillow's about EXIF data and palettes are harmless
            return image.convert(mode)
    except Exception as error:  # a damaged file makes decoders fail in any way
        raise UserError(f"{file}: not a readable image ({error}); fetch it again or remove it") from None


def _mode(cfg: Config) -> str:
    return "L" if cfg.in_channels == 1 else "RGB"


def _image_folder(cfg: Config, train: bool) -> ImageFolder:
    """Return `train` or `val` of a folder, with a folder per class in each."""
    split, root = "train" if train else "val", data_path(cfg)
    folders = {
        part: next((root / name for name in names if (root / name).is_dir()), None)
        for part, names in SPLIT_FOLDERS.items()
    }
    if folders[split] is None:
        raise UserError(f"{root}: no folder {split}; make train and val, each with a folder per class")
    if all(folders.values()):
        train_folder, val_folder = (folder.resolve() for folder in folders.values())
        if train_folder.is_relative_to(val_folder) or val_folder.is_relative_to(train_folder):
            raise UserError(f"{folders['train']} and {folders['val']} overlap; keep test images apart")
    try:
        dataset = ImageFolder(str(folders[split]), loader=functools.partial(read_image, mode=_mode(cfg)))
    except FileNotFoundError as error:
        raise UserError(f"{folders[split]}: {error}; complete the data set, with a folder per class") from None
    if is_imagenet(dataset.classes) and len(dataset) != IMAGENET_SIZES[split]:
        size = IMAGENET_SIZES[split]
        logger.warning(f"warning: {folders[split]}: {len(dataset):,} of {size:,} images; extract its archive again")
    if train and folders["val"]:
        _warn_of_copies(dataset, folders["val"])
    return dataset


def _warn_of_copies(train: ImageFolder, val: Path, most: int = 64) -> None:
    """Look for some images of the folder `val` in the same class of the training set, by their names and bytes."""
    images = make_dataset(str(val), train.class_to_idx, IMG_EXTENSIONS, allow_empty=True)
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


def data_path(cfg: Config, must_exist: bool = True) -> Path:
    """Return the folder of the data set, absolute."""
    if cfg.data_path is None:
        raise UserError(f"dataset {cfg.dataset}: its folder is unknown; use --data-path")
    root = Path(cfg.data_path).resolve()
    if must_exist and not root.is_dir():
        raise UserError(f"{root}: no such folder; use --data-path, or --download for CIFAR")
    return root


def _of_timm(cfg: Config, train: bool) -> Dataset:
    """Return a data set of torchvision (`torch/`), of WebDataset shards (`wds/`) or of Hugging Face (`hfds/`)."""
    kind = cfg.dataset.lower().split("/")[0]
    if kind not in ("torch", "wds", "hfds") or "/" not in cfg.dataset:
        known = ", ".join([*DATASETS, *EVENT_DATASETS])
        raise UserError(f"dataset = {cfg.dataset!r}: unknown; use {known}, torch/NAME, wds/NAME or hfds/NAME")
    # shards are files of a folder here: under an address like pipe:COMMAND, their names would be commands
    root = cfg.data_path if kind == "hfds" else str(data_path(cfg, must_exist=not cfg.download))
    split, mode = cfg.train_split if train else cfg.val_split, _mode(cfg)

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
                input_img_mode=mode,
            )
        except Exception as error:  # each library fails in its own way
            raise UserError(f"{cfg.dataset} in {root}: {error!r}; use --data-path, or --download") from None

    dataset = world.in_turns(make) if cfg.download else make()
    if train and type(dataset) is ImageFolder and dataset.root == root:  # what timm falls back to
        raise UserError(f"{root}: no folder {split}; make one for training and one for testing")
    if hasattr(dataset, "loader"):
        dataset.loader = functools.partial(read_image, mode=mode)
    if not train and isinstance(dataset, IterableDataset):
        # on several ranks timm's stream would repeat or skip samples; here each rank reads all and keeps its share
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
    return dataset


DATASETS = {"digits": lambda cfg, train: Digits(train), "imagefolder": _image_folder}
