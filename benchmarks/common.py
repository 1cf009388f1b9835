"""Shared parts of the benchmarks: machine, networks and batches, result files."""

import gc
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

import joblib
import torch
from torch import Tensor, nn

from engine.config import EVENT_DATASETS, MODEL_FIELDS, Config
from engine.log import provenance, setup_console, write_whole
from engine.world import set_arithmetic, setup
from models import create_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
PACKAGES = "torch torchvision triton cupy-cuda13x spikingjelly timm numpy pillow joblib".split()  # versions to record


def machine(name: str, device: torch.device | None = None) -> dict:
    """Describe the machine, its load and the versions for the results of `python -m benchmarks.NAME`."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search("^model name\\s*: (.*)$", cpuinfo, re.MULTILINE)
    where = {"cpu": model[1] if model else platform.processor(), "cores": joblib.cpu_count()}
    versions = {d.name: d.version for d in distributions() if d.name in PACKAGES}
    versions["python"] = platform.python_version()
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "git_commit": provenance()["git_commit"],
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": where,
        "load_of_the_minute_before": os.getloadavg()[0],
        "versions": versions,
    }


def choose(device: str) -> torch.device:
    """Set up the device "auto", "cpu" or "cuda" with the arithmetic of training; raises `UserError` if missing."""
    torch.manual_seed(0)
    setup_console(is_main=True)
    set_arithmetic(Config())
    return setup(device).device


def result_path(folder: Path, name: str, device: Mapping[str, object]) -> Path:
    """Return the file for today's results on this device; create the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    where = re.sub("[^a-z0-9]+", "-", str(device.get("gpu", f"{device['cores']}-core-cpu")).lower())
    return folder / f"{name}-{time.strftime('%Y%m%d')}-{where}.json"


def write(path: Path, report: dict) -> None:
    """Write results as JSON."""
    write_whole(path, json.dumps(report, indent=1, default=str) + "\n")


def runs_in(path: Path) -> list[dict]:
    """Return the earlier runs in `path`, of a benchmark that measures part by part."""
    return json.loads(path.read_text())["runs"] if path.exists() else []


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    values = list(values)
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def network(cfg: Config, **changes) -> nn.Module:
    """Create the network of a recipe with other arguments of `create_model`; raises ValueError as it does."""
    settings = {key: getattr(cfg, key) for key in MODEL_FIELDS[1:] if getattr(cfg, key) is not None}
    return create_model(cfg.model, **settings | changes)


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
