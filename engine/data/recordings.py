"""The raw files of DVS128 Gesture and CIFAR10-DVS: where they are, and which samples they are cut into.

Archives are read where they lie and never extracted, changed or deleted.
"""

import contextlib
import functools
import gzip
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spikingjelly.datasets.cifar10_dvs import CIFAR10DVS
from spikingjelly.datasets.dvs128_gesture import DVS128Gesture
from torchvision.datasets.utils import download_url

from ..cli import UserError
from ..log import logger
from .aedat import Events, read_aedat2, read_aedat31
from .frames import LARGEST, open_zip, read_file, read_member

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR10_RECORDINGS = 1000  # per class
# class folders are numbers, which sort as text: label 2 is gesture 11
GESTURES = {
    "0": "hand clapping",
    "1": "right hand wave",
    "10": "other gestures",
    "2": "left hand wave",
    "3": "right arm clockwise",
    "4": "right arm counter-clockwise",
    "5": "left arm clockwise",
    "6": "left arm counter-clockwise",
    "7": "arm roll",
    "8": "air drums",
    "9": "air guitar",
}
TEXTS = (".txt", ".csv")  # lists of trials and tables of labels
LARGEST_TEXT = 2**20  # bytes
MOST_FILES = 10_000  # in the archive of DVS128 Gesture, which has some 250

Opener = Callable[[], Callable[[], bytes]]  # in this process it opens a file, in any process the result reads it


@dataclass(frozen=True)
class Recording:
    """One raw file, and what `frames.convert` makes of it."""

    name: str
    open: Opener
    decode: Callable[[bytes], Events]
    samples: Mapping[str, tuple[int, int] | None]  # file of frames -> time span in microseconds, None for all


def cifar10_dvs(root: Path, download: bool) -> list[Recording]:
    """The recordings of CIFAR10-DVS: for each class a zip archive or a folder of *.aedat.

    Raises:
        UserError: a class or recording is missing, or an archive is damaged; it says what to place where.
    """
    if download:
        _download(root)
    sources = {name: _source(root, name) for name in CIFAR10_CLASSES}
    if absent := [name for name, path in sources.items() if path is None]:
        raise UserError(
            f"{root / 'download'} lacks {', '.join(f'{name}.zip' for name in absent)}: fetch CIFAR10-DVS there with "
            "--download (figshare.com/articles/dataset/CIFAR10-DVS_New/4724671), or say with --data-path where it is"
        )
    files = {name: _aedat_files(path) for name, path in sources.items()}
    _refuse_gaps(files, sources)
    return [
        Recording(f"{sources[label]}: {stem}.aedat", lambda r=read: r, read_aedat2, {f"{label}/{stem}.npy": None})
        for label, reads in files.items()
        for stem, read in reads.items()
    ]


def _source(root: Path, label: str) -> Path | None:
    return _first_of(root, f"{label}.zip", label)


def _first_of(root: Path, *names: str) -> Path | None:
    """The first that exists, in `root` itself or where spikingjelly keeps archives and what it extracts."""
    candidates = [root / place / name for name in names for place in ("download", "", "extract")]
    return next((path for path in candidates if path.exists()), None)


def _aedat_files(source: Path) -> dict[str, Callable[[], bytes]]:
    """stem -> what reads it, of the *.aedat in a folder or a zip archive."""
    if source.is_dir():
        files = sorted(path for path in source.glob("*.aedat") if path.is_file())
        return {_stem(path.name, source): functools.partial(read_file, path) for path in files}
    with _intact(source):
        members = open_zip(source).namelist()
    members = [name for name in members if name.endswith(".aedat") and not Path(name).name.startswith(".")]
    return {_stem(name, source): functools.partial(read_member, source, name) for name in members}


def _stem(name: str, source: Path) -> str:
    """The name of a recording without folders and suffix: plain, for it names files, and is printed."""
    stem = Path(name).stem
    if not re.fullmatch(r"[\w.+-]{1,100}", stem):
        raise UserError(f"{source}: {name[:50]!r} is no name of a recording; fetch it again")
    return stem


@contextlib.contextmanager
def _intact(archive: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged archive makes its reader fail in any way
        if isinstance(error, OSError) and error.filename:
            raise
        reason = str(error) or type(error).__name__
        raise UserError(f"{archive}: a damaged archive ({reason}); fetch it again") from None


def _refuse_gaps(files: Mapping[str, Iterable[str]], sources: Mapping[str, Path]) -> None:
    """The recordings of each class are numbered alike: name those that only some classes have."""
    numbers = {label: {stem.rsplit("_", 1)[-1]: stem for stem in stems} for label, stems in files.items()}
    known = {number for stems in numbers.values() for number in stems if number.isdigit()}
    for label, stems in numbers.items():
        if not stems:
            raise UserError(f"{sources[label]} holds no recordings (*.aedat); fetch it again")
        absent = sorted(known - set(stems), key=int)
        if absent and len(stems) != CIFAR10_RECORDINGS:
            prefix = next(iter(stems.values())).rsplit("_", 1)[0]
            raise UserError(
                f"{sources[label]} lacks {len(absent)} recordings that other classes have, such as "
                f"{prefix}_{absent[0]}.aedat; complete it"
            )


def _download(root: Path) -> None:
    folder = root / "download"
    folder.mkdir(parents=True, exist_ok=True)
    archives = [archive for archive in CIFAR10DVS.resource_url_md5() if not _source(root, Path(archive[0]).stem)]
    if archives:
        logger.info(
            f"fetching {len(archives)} archives of CIFAR10-DVS to {folder}: {', '.join(a[0] for a in archives)}"
        )
    for name, url, md5 in archives:
        try:
            download_url(url, str(folder), f"{name}.part", md5)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{url}: cannot be fetched ({error}); try again, or place {folder / name} by hand"
            ) from None
        (folder / f"{name}.part").replace(folder / name)


def dvs128_gesture(root: Path, download: bool) -> list[Recording]:
    """The recordings of DVS128 Gesture: its archive, or the folder that it unpacks to.

    Raises:
        UserError: a list, a table of labels or a recording is missing or damaged; it says what to place where.
    """
    source = _first_of(root, "DvsGesture.tar.gz", "DvsGesture")
    if source is None and (root / "trials_to_train.txt").exists():
        source = root
    if source is None:
        raise UserError(
            f"{root / 'download'} lacks DvsGesture.tar.gz: fetch it by hand, for its owner lets no program do so, from "
            f"{DVS128Gesture.resource_url_md5()[0][1]}, place it there, or say with --data-path where it is"
        )
    texts, opens = _folder_files(source) if source.is_dir() else _tar_files(source)

    def text(name: str) -> str:
        if name not in texts:
            raise UserError(f"{source} lacks {name}; complete it")
        return texts[name].decode(errors="replace")

    train, test = (text(f"trials_to_{part}.txt").split() for part in ("train", "test"))
    if both := set(train) & set(test):
        raise UserError(f"{source}: {min(both)} is listed for training and for testing; fetch it again")
    places = dict.fromkeys(train, "train") | dict.fromkeys(test, "test")
    if absent := [name for name in places if name not in opens]:
        raise UserError(f"{source} lacks {len(absent)} of {len(places)} recordings, such as {absent[0]}; complete it")
    found = []
    for name, open_file in opens.items():  # in the order of the archive, which can only be read from end to end
        if name in places:
            stem = _stem(name, source)
            labels = f"{stem}_labels.csv"
            samples = _gestures(text(labels), places[name], stem, f"{source}: {labels}")
            found.append(Recording(f"{source}: {name}", open_file, read_aedat31, samples))
    return found


def _gestures(table: str, place: str, stem: str, where: str) -> dict[str, tuple[int, int]]:
    """File -> time span, of each line of a recording's table of labels."""
    samples, counts = {}, {}
    for number, row in enumerate(table.splitlines(), 1):
        if number == 1 or not row:
            continue
        try:
            gesture, start, end = map(int, row.split(","))
        except ValueError:
            gesture = start = end = 0
        if not 1 <= gesture <= len(GESTURES) or not 0 <= start < end < 2**63:
            raise UserError(f"{where}, line {number}: {row[:50]!r} is not a class of 1 to 11, a start and an end")
        count = counts[gesture] = counts.get(gesture, -1) + 1
        samples[f"{place}/{gesture - 1}/{stem}_{count}.npy"] = (start, end)
    if not samples:
        raise UserError(f"{where}: no labels; fetch it again")
    return samples


def _folder_files(folder: Path) -> tuple[dict[str, bytes], dict[str, Opener]]:
    """Lists and tables by name, and what opens each recording."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    texts = [path for path in paths if path.suffix in TEXTS]
    if giant := next((path for path in texts if path.stat().st_size > LARGEST_TEXT), None):
        raise UserError(f"{giant}: too large for a list or a table of labels; fetch it again")
    opens = {
        path.name: lambda path=path: functools.partial(read_file, path) for path in paths if path.suffix == ".aedat"
    }
    return {path.name: path.read_bytes() for path in texts}, opens


class _Gzip(gzip.GzipFile):
    """A compressed file of which no single read gives more than a recording can have, whatever a tar's headers say."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST:
            raise tarfile.ReadError(f"a part of {size:,} bytes")
        return super().read(size)


def _tar_files(path: Path) -> tuple[dict[str, bytes], dict[str, Opener]]:
    """The same of a compressed tar archive. It has no index: this process reads it once now, and once more later."""
    logger.info(f"reading {path} for its contents")
    texts, opens = {}, {}
    with _intact(path):
        archive = tarfile.open(fileobj=_Gzip(path), mode="r:")  # noqa: SIM115, it stays open as long as what is returned
        for number, member in enumerate(archive):
            name = Path(member.name).name
            if number == MOST_FILES or member.size > (LARGEST_TEXT if name.endswith(TEXTS) else LARGEST):
                raise tarfile.ReadError("it holds more files than it should, or larger ones")
            if member.isfile() and name.endswith(TEXTS):
                texts[name] = archive.extractfile(member).read()
            elif member.isfile() and name.endswith(".aedat"):
                opens[name] = lambda m=member: functools.partial(bytes, archive.extractfile(m).read())
        while archive.fileobj.read(2**20):
            pass  # the checksum of the whole stands at its end
    return texts, opens
