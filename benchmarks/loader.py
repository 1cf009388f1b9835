"""Samples a second of the recipes' input pipelines, in total and per core.

    python -m benchmarks.loader [--help]

Times the recipes' loaders up to the batch of bytes in the training process, with one worker and with one on each core.
The data are synthetic, in real formats and sizes. They lie in memory, so no disk is measured. A GPU that trains X
samples a second needs X / (samples a second per core) cores. The same command resumes an interrupted benchmark.
"""

import functools
import io
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import joblib
import numpy as np
import torch
from tabulate import tabulate
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100

from analysis.common import ROOT, main, parser, positive
from engine import config, world
from engine.config import Config
from engine.data.frames import integrate
from engine.data.recordings import RAW
from engine.log import logger
from engine.run import create_data

from .common import RESULTS, Results, spread
from .synthetic import events, fill, jpeg, write_cifar

FILES = 64  # different files; all others are links to them
CLASSES = 4  # of the folder of images
FRAMES = 16
WARM_UP, AHEAD = 2, 2  # batches of each worker before and after the timed ones


class Case(NamedTuple):
    """Input pipeline, and the function that writes its data."""

    recipe: str
    write: Callable[[Path, int, int], object]  # arguments: folder, numbers of training and test samples
    batches: int = 60  # of each worker, in a second or two
    part: str = "train"
    flags: tuple[str, ...] = ()

    def config(self, root: Path, workers: int) -> Config:
        """Return the settings for data in `root`."""
        return config.load(ROOT / self.recipe, ["--data-path", str(root), "--workers", str(workers), *self.flags])


def write_images(root: Path, train: int, test: int) -> None:
    """Write train/CLASS/*.JPEG and val/CLASS/*.JPEG."""
    random = np.random.default_rng(0)
    jpegs = [jpeg(random) for _ in range(FILES)]
    for split, count in (("train", train), ("val", max(test, CLASSES))):
        fill(jpegs, [root / split / f"n{i % CLASSES:08d}" / f"{i}.JPEG" for i in range(count)])


def write_frames(name: str, size: int, root: Path, train: int, test: int) -> None:
    """Write the folder of frames of recordings with `size` events each."""
    random, classes, contents = np.random.default_rng(0), list(RAW[name].classes), []
    for _ in range(FILES):
        file = io.BytesIO()
        np.save(file, integrate(events(size, random), FRAMES))
        contents.append(file.getvalue())
    parts = {"train/": train, "test/": max(test, 1)}
    if name == "cifar10-dvs":  # 90 % of each class train
        parts = {"": math.ceil(train / 0.9) + 2 * len(classes)}
    names = [f"{part}{classes[i % len(classes)]}/{i}.npy" for part, count in parts.items() for i in range(count)]
    fill(contents, [root / f"frames_{FRAMES}" / file for file in names])


IMAGENET = Case("imagenet/qkformer_10_384.yml", write_images, 16, flags=("--num-classes", str(CLASSES)))
CASES = {
    "imagenet": IMAGENET,
    "imagenet-test": IMAGENET._replace(part="test"),
    "cifar10": Case("cifar10/cifar10.yml", functools.partial(write_cifar, CIFAR10, 10)),
    "cifar100": Case("cifar100/cifar100.yml", functools.partial(write_cifar, CIFAR100, 100)),
}
for _name, _size in (("dvs128-gesture", 350_000), ("cifar10-dvs", 200_000)):
    CASES[_name] = Case(f"{_name}/{_name}.yml", functools.partial(write_frames, _name, _size))


def seconds(loader: DataLoader, batches: int) -> float:
    """Return the seconds for `batches` of each worker, after the warm-up."""
    times = [time.perf_counter() for _ in loader]
    warm_up = WARM_UP * loader.num_workers - 1
    return times[warm_up + batches * loader.num_workers] - times[warm_up]


def measure(case: Case, root: Path, cores: int, repeats: int, batches: int | None) -> dict:
    """Write a pipeline's data, time it and return the figures."""
    batch_size, batches = case.config(root, 0).batch_size, batches or case.batches
    count = (WARM_UP + batches + AHEAD) * cores * batch_size
    case.write(root, *((count, batch_size) if case.part == "train" else (batch_size, count)))
    rates = defaultdict(list)
    with (  # tiny synthetic data would cause warnings and fail the md5 check
        mock.patch.object(logger, "disabled", True),
        mock.patch("torchvision.datasets.cifar.check_integrity"),
    ):
        rank = world.setup("auto")
        data = {n: create_data(case.config(root, n), rank) for n in sorted({1, cores})}
        loaders = {n: (d.train.loader if case.part == "train" else d.test).loader for n, d in data.items()}
        for _ in range(repeats):
            for workers, loader in loaders.items():
                rates[str(workers)].append(batches * workers * loader.batch_size / seconds(loader, batches))
    return {
        "batch_size": batch_size,
        "batches_of_each_worker": batches,
        "samples_per_s": {workers: spread(values) | {"all": values} for workers, values in rates.items()},
        "samples_per_s_of_a_core": statistics.median(rates[str(cores)]) / cores,
    }


def run(argv: Sequence[str]) -> None:
    flags = parser(__doc__)
    flags.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="pipelines to measure (all)")
    flags.add_argument("--repeats", type=positive, default=5, help="passes over each pipeline, in turns (5)")
    flags.add_argument("--batches", type=positive, help="batches of a worker in a pass (16 for ImageNet, else 60)")
    flags.add_argument("--output", type=Path, default=RESULTS, help=f"folder to write to ({RESULTS})")
    args = flags.parse_args(argv)
    torch.set_num_threads(1)  # as the workers
    file = Results("loader", args, torch.device("cpu"), ("repeats", "batches"))
    for name in args.cases:
        if name not in {result["name"] for result in file.kept}:
            with tempfile.TemporaryDirectory() as folder:
                figures = measure(CASES[name], Path(folder), joblib.cpu_count(), args.repeats, args.batches)
            file.write([{"name": name, **figures}])
    rows = []
    for result in (result for result in file.all if result["name"] in args.cases):
        row = {"samples/s: min median max": result["name"]}
        for workers, figures in result["samples_per_s"].items():
            row[f"workers: {workers}"] = "{min:,.0f} {median:,.0f} {max:,.0f}".format(**figures)
        rows.append(row | {"a core": f"{result['samples_per_s_of_a_core']:,.0f}"})
    print(file.path, tabulate(rows, headers="keys", disable_numparse=True), sep="\n\n")


if __name__ == "__main__":
    main(run)
