"""Recordings of event data sets, in folders and archives, and the samples in them. `RAW` lists the data sets.

Archives are read in place and never extracted, changed or deleted.
"""

import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.utils import download_url

from ..cli import UserError
from ..log import logger
from . import digits
from .aedat import SIDE
from .folders import find_classes, is_hidden, require_equal_classes, split_folders
from .frames import DECODERS, LARGEST, WHOLE, Reader, Spans, read_member

CIFAR10_DVS = "airplane automobile bird cat deer dog frog horse ship truck".split()
GESTURE_PAGE = "https://ibm.ent.box.com/s/3hiq58ww1pbbjrinh367ykfdf60xsfm8/folder/50167556794"
GESTURES = (
    "hand clapping, right hand wave, left hand wave, right arm clockwise, right arm counter-clockwise, left arm "
    "clockwise, left arm counter-clockwise, arm roll, air drums, air guitar, other gestures"
).split(", ")  # 1 to 11 in the tables of labels
SUFFIX = ".aedat"
TEXTS = (".txt", ".csv")  # lists of trials and tables of labels
MOST_FILES = 10_000  # in the archive of DVS128 Gesture, which has some 250
FRAMES = re.compile(r"frames_\d+(_|\.|$)")  # folders that `prepare` makes

Opener = Callable[[], Reader]  # opens a file in this process; any process can call the result


class Recording(NamedTuple):
    """A file of events, and its samples."""

    name: str
    open: Opener
    samples: Spans  # by the name of their file of frames


def cifar10_dvs(root: Path, download: bool) -> list[Recording]:
    """List the recordings of CIFAR10-DVS: for each class a zip archive or a folder."""
    if download:
        _download(root)
    sources = {label: _first_of(root, f"{label}.zip", label) for label in CIFAR10_DVS}
    if absent := [f"{label}.zip" for label, path in sources.items() if path is None]:
        raise UserError(f"{root / 'download'}: no {', '.join(absent)}; use --download, or --data-path")
    return _by_class(sources, SUFFIX)


def _by_class(sources: Mapping[str, Path], *suffixes: str) -> list[Recording]:
    """List the recordings of folders or archives, given by the folder of their frames."""
    return [
        Recording(f"{source}: {name}", opener, {f"{folder}/{name.removesuffix(SUFFIX)}.npy": WHOLE})
        for folder, source in sources.items()
        for name, opener in _list(source, *suffixes).items()
    ]


def _first_of(root: Path, *names: str) -> Path | None:
    """Return the first existing path, in `root` or in spikingjelly's folders of archives and extracted files."""
    paths = (root / place / name for name in names for place in ("download", "", "extract"))
    return next(filter(Path.exists, paths), None)


def _list(source: Path, *suffixes: str) -> dict[str, Opener]:
    """Return the files with one of the suffixes in a folder, a zip or a tar archive."""
    try:
        if source.is_dir():
            files = {path.name: partial(partial, path.read_bytes) for path in sorted(source.iterdir())}
        elif source.suffix == ".zip":
            with zipfile.ZipFile(source) as file:
                files = {name: partial(partial, read_member, source, name) for name in file.namelist()}
        else:
            files = _list_tar(source)
    except Exception as error:  # a damaged archive makes its reader fail in any way
        raise UserError(f"{source}: damaged ({str(error) or type(error).__name__}); fetch it again") from None
    files = {Path(name).name: opener for name, opener in files.items() if not is_hidden(name)}
    chosen = {name: opener for name, opener in files.items() if name.lower().endswith(suffixes)}
    if not chosen:
        kinds = sorted({Path(name).suffix for name in files})
        raise UserError(f"{source}: holds {', '.join(kinds) or 'nothing'}; needs {', '.join(suffixes)} files")
    return chosen


def _list_tar(archive: Path) -> dict[str, Opener]:
    logger.info(f"listing {archive}, which takes a minute")
    files, file = {}, tarfile.open(archive, "r:gz")  # noqa: SIM115, the openers read it
    for number, member in enumerate(file):
        if number == MOST_FILES or member.size > LARGEST:
            raise tarfile.ReadError("too many files, or too large ones")
        if member.isfile():
            files[member.name] = lambda m=member: partial(bytes, file.extractfile(m).read())
            if member.name.endswith(TEXTS):  # read now, because reading back would start at the beginning
                files[member.name] = partial(partial, files[member.name]())
    while file.fileobj.read(2**20):
        pass  # up to the checksum at the end
    return files


def _download(root: Path) -> None:
    from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS  # a second to import

    folder = root / "download"
    folder.mkdir(parents=True, exist_ok=True)
    for name, address, md5 in CIFAR10DVS.resource_url_md5():
        if _first_of(root, name, Path(name).stem):
            continue
        part = folder / f"{name}.part"
        logger.info(f"fetching {folder / name}")
        try:
            download_url(address, str(folder), part.name, md5)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{address}: not {name} ({error}); try again, or fetch it by hand") from None
        part.replace(folder / name)


def dvs128_gesture(root: Path, download: bool) -> list[Recording]:
    """List the recordings of DVS128 Gesture, of its archive or its folder; `download` has no effect."""
    source = _first_of(root, "DvsGesture.tar.gz", "DvsGesture")
    if source is None:
        raise UserError(f"{root / 'download'}: no DvsGesture.tar.gz; fetch it from {GESTURE_PAGE}, or use --data-path")
    files = _list(source, SUFFIX, *TEXTS)

    def text(name: str) -> str:
        if name not in files:
            raise UserError(f"{source}: no {name}; complete it")
        return files[name]()().decode(errors="replace")

    parts = {name: part for part in ("train", "test") for name in text(f"trials_to_{part}.txt").split()}
    if absent := [name for name in parts if name not in files]:
        raise UserError(f"{source}: {len(absent)} of {len(parts)} recordings are missing, such as {absent[0]}")
    recordings = []
    for name in files:  # in the order of the archive, because reading back would start at the beginning
        if name in parts:
            table = f"{Path(name).stem}_labels.csv"
            samples = _gestures(text(table), parts[name], Path(name).stem, f"{source}: {table}")
            recordings.append(Recording(f"{source}: {name}", files[name], samples))
    return recordings


def _gestures(table: str, part: str, stem: str, where: str) -> dict[str, tuple[int, int]]:
    """Return file -> time span for each line of a recording's table of labels."""
    samples, counts = {}, Counter()
    for number, row in enumerate(table.rstrip().splitlines()[1:], 2):
        try:
            gesture, start, end = map(int, row.split(","))
        except ValueError:
            gesture = start = end = 0
        if not 1 <= gesture <= len(GESTURES) or not 0 <= start < end < 2**63:
            raise UserError(f"{where}, line {number}: {row[:50]!r} is not a class of 1 to 11, a start and an end")
        samples[f"{part}/{gesture - 1}/{stem}_{counts[gesture]}.npy"] = (start, end)
        counts[gesture] += 1
    if not samples:
        raise UserError(f"{where}: no labels; fetch it again")
    return samples


class Raw(NamedTuple):
    """A data set of recordings."""

    find: Callable[[Path, bool], list[Recording]] | None  # lists recordings in a folder; True downloads them
    classes: Mapping[str, str]  # class folder -> name, in the order of the labels
    sizes: Mapping[str, int]  # published samples of each part
    is_split: bool  # in folders "train" and "test"; otherwise `event.split_by_class` splits the frames
    side: int | None = SIDE  # pixels of the sensor, in height and in width; None: --sensor-size


RAW = {
    "digits-dvs": Raw(None, {name: name for name in digits.Digits.classes}, {}, True, digits.SIDE),
    "cifar10-dvs": Raw(cifar10_dvs, {name: name for name in CIFAR10_DVS}, {"train": 9000, "test": 1000}, False),
    "dvs128-gesture": Raw(
        dvs128_gesture,
        {folder: GESTURES[int(folder)] for folder in sorted(map(str, range(11)))},  # label 2 is gesture 11
        {"train": 1176, "test": 288},
        is_split=True,
    ),
}
EVENT_DATASETS = ("eventfolder", *RAW)


def event_folder(root: Path, split_seed: int | None) -> Raw:
    """Describe a user's folder: train/CLASS/* and test/CLASS/*, or CLASS/* and a seed that splits it."""
    folders = split_folders(root)
    if len(folders) == 1 or (not folders and split_seed is None):
        raise UserError(f"{root}: no folders train and test; make both, or use --split-seed on a folder per class")
    folders = {f"{part}/": folder for part, folder in folders.items()} or {"": root}
    classes = [[name for name in find_classes(folder)[0] if not FRAMES.match(name)] for folder in folders.values()]
    require_equal_classes(root, classes[0], classes[-1])
    sources = {f"{part}{name}": folder / name for part, folder in folders.items() for name in classes[0]}
    names = {name: name for name in classes[0]}
    return Raw(lambda *_: _by_class(sources, *DECODERS), names, {}, len(folders) == 2, side=None)
