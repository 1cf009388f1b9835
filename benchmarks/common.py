"""Shared parts of the benchmarks: machine, networks and batches, result files."""

import argparse
import gc
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import distributions
from pathlib import Path

import joblib
import torch
from torch import Tensor, nn

from engine.config import MODEL_FIELDS, Config, load
from engine.data.recordings import EVENT_DATASETS
from engine.log import provenance, setup_console, write_whole
from engine.world import set_arithmetic, setup
from models import create_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
CONFIGURATIONS = {  # model -> recipe, batch size
    "qkformer_10_384": ("imagenet/qkformer_10_384.yml", 128),
    "qkformer_10_768": ("imagenet/qkformer_10_768.yml", 64),
    "qkformer_4_384": ("cifar10/cifar10.yml", 64),
    "qkformer_2_256": ("cifar10-dvs/cifar10-dvs.yml", 16),
    "qkformer_3_64": ("digits/digits.yml", 16),
    "qkformer_2_64": ("digits-dvs/digits-dvs.yml", 16),
}
PUBLISHED = list(CONFIGURATIONS)[:4]
PACKAGES = "torch torchvision triton cupy-cuda13x spikingjelly timm numpy pillow joblib".split()  # versions to record


def machine(device: torch.device) -> dict:
    """Describe the machine, its load and package versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search("^model name\\s*: (.*)$", cpuinfo, re.MULTILINE)
    where = {"cpu": model[1] if model else platform.processor(), "cores": joblib.cpu_count()}
    versions = {d.name: d.version for d in distributions() if d.name in PACKAGES}
    versions["python"] = platform.python_version()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"device": where, "load_of_the_minute_before": os.getloadavg()[0], "versions": versions}


class Results:
    """Results of `python -m benchmarks.NAME` in NAME-DATE-DEVICE.json, next to those of earlier runs.

    `kept` has the earlier results of this commit, device and `decisive` arguments, if all changes are committed.
    """

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device, decisive: Iterable[str]):
        self.run = {
            "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
            "git_commit": provenance()["git_commit"],
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **machine(device),
            "arguments": vars(args),
            "results": [],
        }
        self.device = self.run["device"].get("gpu", f"{self.run['device']['cores']}-core-cpu")
        where = re.sub("[^a-z0-9]+", "-", self.device.lower())
        args.output.mkdir(parents=True, exist_ok=True)
        self.path = args.output / f"{name}-{time.strftime('%Y%m%d')}-{where}.json"
        self.runs = json.loads(self.path.read_text())["runs"] if self.path.exists() else []

        def key(run: dict) -> list:
            return [run["git_commit"], run["device"], *(str(run["arguments"].get(name)) for name in decisive)]

        same = [run for run in self.runs if key(run) == key(self.run)]
        is_committed = not self.run["git_commit"].endswith("+changes")
        self.kept = [result for run in same if is_committed for result in run["results"]]
        self.runs.append(self.run)

    @property
    def all(self) -> list[dict]:
        """Return the results that count: kept ones and those of this run."""
        return self.kept + self.run["results"]

    def write(self, results: Iterable[dict]) -> None:
        """Add results of this run and write the file."""
        self.run["results"] += results
        write_whole(self.path, json.dumps({"runs": self.runs}, indent=1, default=str) + "\n")


def choose(device: str) -> torch.device:
    """Set up the device "auto", "cpu" or "cuda" with the arithmetic of training; raise `UserError` if it is missing."""
    torch.manual_seed(0)
    setup_console(is_main=True)
    set_arithmetic(Config())
    return setup(device).device


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    values = list(values)
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def network(cfg: Config, **changes) -> nn.Module:
    """Create the network of a recipe with other arguments of `create_model`."""
    settings = {key: getattr(cfg, key) for key in MODEL_FIELDS[1:] if getattr(cfg, key) is not None}
    return create_model(cfg.model, **settings | changes)


def recipe(model: str, **changes) -> Config:
    """Return the recipe of a network with the measured batch size and other changes."""
    path, batch_size = CONFIGURATIONS[model]
    return load(ROOT / path, [f"--{key}={value}" for key, value in ({"batch_size": batch_size} | changes).items()])


def random_batch(cfg: Config, device: torch.device, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """Draw `samples` or a recipe's batch: images [B,C,H,W] or event frames [B,T,C,H,W], and labels [B]."""
    rng, samples = torch.Generator().manual_seed(0), samples or cfg.batch_size
    shape = (cfg.in_channels, cfg.input_size, cfg.input_size)
    if cfg.dataset in EVENT_DATASETS:
        x = torch.poisson(torch.full((samples, cfg.time_steps, *shape), 0.3), generator=rng)  # counts of events
    else:
        x = torch.randn(samples, *shape, generator=rng)
    return x.to(device), torch.randint(cfg.num_classes, (samples,), generator=rng).to(device)


def stopwatch(device: torch.device) -> Callable[[], float]:
    """Start timing; the returned call waits for `device` and returns the elapsed ms."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    return lambda: wait() or 1000 * (time.perf_counter() - start)


def release(device: torch.device) -> None:
    """Release unused memory of the device for other processes."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
