"""How many samples a second the input pipelines of the recipes deliver, and where the time of a sample goes.

    python -m benchmarks.loader [--help]

The data are synthetic, in the true formats and of realistic size, and lie in the system's memory: no disk is measured.
Timed are the loaders of the recipes, up to the batch of bytes in the training process: with one worker process, and
with one on each core. The steps are timed one by one, in one thread, with them what is done to a batch on the device.
"""

import argparse
import contextlib
import functools
import io
import itertools
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import joblib
import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch.utils.data import DataLoader

from analysis.common import ROOT, main, parser, positive
from engine import config, world
from engine.cli import UserError
from engine.config import Config
from engine.data.aedat import Events
from engine.data.event import RAW
from engine.data.frames import integrate
from engine.data.loaders import Data
from engine.log import logger
from engine.run import create_data
from tests.tiny_data import cifar, events

from .common import RESULTS, machine, result_path, write

PACKAGES = ("torch", "torchvision", "timm", "pillow", "numpy", "spikingjelly")
FILES = 64  # of different content; all others of a data set are links to them
CLASSES = 4  # of the folder of images
SIZE, QUALITY = (375, 500), 89  # of a JPEG, which has 115 kB then: the mean of ImageNet's training set
WARM_UP = 2  # batches of each worker before the clock starts
AHEAD = 2  # batches that a worker makes before they are asked for: none shall run out of work while the clock runs


@dataclass(frozen=True)
class Case:
    """An input pipeline, and how data for it are written."""

    recipe: str
    write: Callable[[Path, int, int], object]  # into a folder, so many training and test samples
    batches: int  # of each worker, in a second or two
    part: str = "train"
    flags: tuple[str, ...] = ()

    def config(self, root: Path, workers: int) -> Config:
        flags = ("--data-path", str(root), "--workers", str(workers), *self.flags)
        return config.load(ROOT / self.recipe, flags)

    def loader(self, data: Data) -> object:
        """The one that is measured: its `loader` gives bytes, and it brings them to the device."""
        return data.train.loader if self.part == "train" else data.test


def fill(contents: Sequence[bytes], paths: Sequence[Path]) -> None:
    """Write `contents` to `paths` in turns; what is there already is linked."""
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True)
    for i, path in enumerate(paths):
        if i < len(contents):
            path.write_bytes(contents[i])
        else:
            path.hardlink_to(paths[i % len(contents)])


def texture(side: int, random: np.random.Generator) -> np.ndarray:
    """uint8 [side,side,3]: noise whose amplitude falls with its frequency, as in photographs; mostly grey."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    grey, *colours = (np.fft.irfft2(np.fft.rfft2(random.normal(size=(side, side))) / frequency) for _ in range(4))
    image = grey[..., None] + 0.3 * np.stack(colours, -1)
    return np.clip(128 + 55 * image / image.std(), 0, 255).astype(np.uint8)


def write_images(root: Path, train: int, test: int) -> None:
    """train/CLASS/*.JPEG and val/CLASS/*.JPEG."""
    random = np.random.default_rng(0)
    picture = texture(1024, random)
    jpegs = []
    for top, left in random.integers(0, 1024 - max(SIZE), (FILES, 2)):
        file = io.BytesIO()
        Image.fromarray(picture[top : top + SIZE[0], left : left + SIZE[1]]).save(file, "JPEG", quality=QUALITY)
        jpegs.append(file.getvalue())
    for split, count in (("train", train), ("val", max(test, CLASSES))):
        fill(jpegs, [root / split / f"n{i % CLASSES:08d}" / f"{i}.JPEG" for i in range(count)])


def write_cifar(classes: int, root: Path, train: int, test: int) -> None:
    cifar(root, classes, train + -train % 5, test)  # CIFAR-10 comes in five files


def write_frames(name: str, size: int, root: Path, train: int, test: int) -> None:
    """The folder that is made of the recordings, each of `size` events."""
    random, classes, frames = np.random.default_rng(0), list(RAW[name].classes), 16
    contents = []
    for i in range(FILES):
        file = io.BytesIO()
        np.save(file, integrate(Events(*events(i % len(classes), len(classes), size, random)), frames))
        contents.append(file.getvalue())
    if name == "dvs128-gesture":
        parts = [("train/", train), ("test/", max(test, 1))]
    else:  # of which 90 % of each class train
        parts = [("", math.ceil(train / 0.9) + 2 * len(classes))]
    names = [f"{part}{classes[i % len(classes)]}/{i}.npy" for part, count in parts for i in range(count)]
    fill(contents, [root / f"frames_{frames}" / file for file in names])


IMAGENET = functools.partial(
    Case, "imagenet/qkformer_10_384.yml", write_images, 16, flags=("--num-classes", str(CLASSES))
)
CASES = {
    "imagenet": IMAGENET(),
    "imagenet-test": IMAGENET(part="test"),
    "cifar10": Case("cifar10/cifar10.yml", functools.partial(write_cifar, 10), 60),
    "cifar100": Case("cifar100/cifar100.yml", functools.partial(write_cifar, 100), 60),
    "dvs128-gesture": Case(
        "dvs128-gesture/dvs128-gesture.yml", functools.partial(write_frames, "dvs128-gesture", 350_000), 60
    ),
    "cifar10-dvs": Case("cifar10-dvs/cifar10-dvs.yml", functools.partial(write_frames, "cifar10-dvs", 200_000), 60),
}


@contextlib.contextmanager
def synthetic() -> Iterator[None]:
    """Data sets may differ from the published ones: without a word of their size, or of the md5 of CIFAR's files."""
    with mock.patch.object(logger, "disabled", True), mock.patch("torchvision.datasets.cifar.check_integrity"):
        yield


def deliver(loader: DataLoader, batches: int) -> tuple[float, float]:
    """A pass: seconds to its first batch, and behind the warm-up for `batches` of each worker."""
    start = time.perf_counter()
    times = [time.perf_counter() - start for _ in loader]
    warm_up = WARM_UP * loader.num_workers - 1
    return times[0], times[warm_up + batches * loader.num_workers] - times[warm_up]


def time_steps(case: Case, cfg: Config, data: Data, device: torch.device, batches: int) -> dict[str, float]:
    """Milliseconds a sample of each step: mean over batches, but for the first."""
    loader, seconds = case.loader(data), defaultdict(list)
    dataset, feed = getattr(loader.dataset, "dataset", loader.dataset), loader.loader
    transforms = []
    if hasattr(dataset, "transform"):
        transforms, dataset.transform = dataset.transform.transforms, None

    def timed(name: str, call: Callable, *args) -> object:
        start = time.perf_counter()
        result = call(*args)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - start)
        return result

    for indices in itertools.islice(feed.batch_sampler, 1 + batches):
        samples = timed("read, decode", lambda chosen: [dataset[i] for i in chosen], indices)
        for step in transforms:
            images, labels = zip(*samples, strict=True)
            images = timed(type(step).__name__, lambda images, step: [step(image) for image in images], images, step)
            samples = list(zip(images, labels, strict=True))
        loader.loader = [timed("collate", feed.collate_fn, samples)]
        images, labels = timed(f"on {device.type}", next, iter(loader))
        if data.augment:
            images = timed(f"augment on {device.type}", data.augment, images)
        if case.part == "train" and data.mixup and cfg.mixup_in == "step":
            timed(f"mixup on {device.type}", data.mixup, images, labels)
    return {name: 1e3 * statistics.mean(values[1:]) / feed.batch_size for name, values in seconds.items()}


def measure(case: Case, root: Path, cores: int, repeats: int, batches: int) -> dict:
    """All figures of a pipeline."""
    batch_size = case.config(root, 0).batch_size
    count = (WARM_UP + batches + AHEAD) * cores * batch_size
    case.write(root, *((count, batch_size) if case.part == "train" else (batch_size, count)))
    rates, first = defaultdict(list), defaultdict(list)
    with synthetic():
        here = world.setup("auto")
        loaders = {n: case.loader(create_data(case.config(root, n), here)).loader for n in sorted({1, cores})}
        for _ in range(repeats):
            for workers, loader in loaders.items():
                start, seconds = deliver(loader, batches)
                rates[workers].append(batches * workers * loader.batch_size / seconds)
                first[workers].append(start)
        cfg = case.config(root, 0)
        steps = time_steps(case, cfg, create_data(cfg, here, case.part == "train"), here.device, batches)
    return {
        "recipe": case.recipe,
        "part": case.part,
        "batch_size": batch_size,
        "batches_of_each_worker": batches,
        "workers_in_recipe": config.load(ROOT / case.recipe).workers,
        "samples_per_s": {
            str(workers): {"min": min(values), "median": statistics.median(values), "max": max(values), "all": values}
            for workers, values in rates.items()
        },
        "samples_per_s_of_a_core": statistics.median(rates[cores]) / cores,
        "seconds_to_first_batch": {str(workers): values for workers, values in first.items()},
        "ms_per_sample": steps,
    }


def feed_gpu(result: dict, speed: float) -> dict:
    """How many cores keep up with a GPU that trains `speed` samples a second."""
    return {"samples_per_s": speed, "cores": math.ceil(speed / result["samples_per_s_of_a_core"])}


def tables(results: dict[str, dict]) -> str:
    """The figures for people."""
    cores = max(int(workers) for result in results.values() for workers in result["samples_per_s"])
    rows, steps, feeding = [], [], []
    for name, result in results.items():
        row = {"samples/s": name}
        for workers in sorted({1, cores}):
            figures = result["samples_per_s"][str(workers)]
            row[f"workers: {workers}"] = "{median:,.0f} ({min:,.0f} to {max:,.0f})".format(**figures)
        wait = statistics.median(result["seconds_to_first_batch"][str(cores)])
        rows.append(row | {"a core": f"{result['samples_per_s_of_a_core']:,.0f}", "first batch (s)": f"{wait:.2f}"})
        listed = ", ".join(f"{step} {value:.3f}" for step, value in result["ms_per_sample"].items())
        steps.append(f"{name}, ms a sample: {listed}")
        if gpu := result.get("gpu"):
            feeding.append(
                f"{name}: {gpu['cores']} cores feed a GPU that takes {gpu['samples_per_s']:,.0f} samples/s; "
                f"the recipe has {result['workers_in_recipe']} workers"
            )
    return "\n".join([*steps, "", tabulate(rows, headers="keys", disable_numparse=True), *feeding])


def speed_of(text: str) -> tuple[str, float]:
    """The `type` of NAME=X."""
    name, _, speed = text.partition("=")
    with contextlib.suppress(ValueError):
        if name in CASES and 0 < float(speed) < math.inf:
            return name, float(speed)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not NAME=SAMPLES_PER_SECOND, where NAME is one of {', '.join(CASES)}"
    )


def run(argv: Sequence[str]) -> None:
    ours = parser(__doc__)
    ours.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="pipelines to measure (all)")
    ours.add_argument("--repeats", type=positive, default=5, help="passes over each, in turns (5)")
    ours.add_argument("--batches", type=positive, help="of each worker in a pass (16 of ImageNet, 60 of the others)")
    ours.add_argument(
        "--train-images-per-s",
        nargs="+",
        type=speed_of,
        default=[],
        metavar="NAME=X",
        help="what a GPU trains, such as imagenet=1500: says how many cores feed it",
    )
    ours.add_argument("--output", type=Path, default=RESULTS, help=f"folder to write to ({RESULTS})")
    args = ours.parse_args(argv)
    if absent := {name for name, _ in args.train_images_per_s} - set(args.cases):
        raise UserError(f"--train-images-per-s {min(absent)}: not among --cases {' '.join(args.cases)}")
    torch.set_num_threads(1)  # as the loader's processes
    report = machine("loader", PACKAGES)
    cores = joblib.cpu_count()
    results = report["pipelines"] = {}
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(CASES[name], Path(folder), cores, args.repeats, args.batches or CASES[name].batches)
    for name, speed in args.train_images_per_s:
        results[name]["gpu"] = feed_gpu(results[name], speed)
    path = result_path(args.output, "loader", report["device"])
    write(path, report)
    print(path, tables(results), sep="\n\n")


if __name__ == "__main__":
    main(run)
