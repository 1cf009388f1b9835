"""What the benchmarks share: what they ran on, networks and steps to time, and the files they leave."""

import contextlib
import gc
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

import joblib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import EVENT_DATASETS, MODEL_FIELDS, Config
from engine.log import provenance, setup_console, write_whole
from engine.trainer import autocast
from engine.world import set_arithmetic, setup
from models import create_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
LR = 1e-4  # of the steps that are timed: on random labels any that is small does
WARM_UP = {"cpu": 1, "cuda": 8}  # steps before the first that is timed: they compile, choose algorithms, capture graphs

Step = Callable[[Tensor, Tensor], Tensor]  # of samples and labels, with a loss or logits


def machine(name: str, packages: Sequence[str], device: torch.device | None = None) -> dict:
    """What the figures of `python -m benchmarks.NAME` are measured on and with, and how busy it was just before."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search("^model name\\s*: (.*)$", cpuinfo, re.MULTILINE)
    where = {"cpu": model[1] if model else platform.processor(), "cores": joblib.cpu_count()}
    versions = {package: installed(package) for package in packages} | {"python": platform.python_version()}
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
    """Return the device that "auto", "cpu" or "cuda" means; it computes as in training with default settings.

    Raises:
        UserError: there is no such device.
    """
    torch.manual_seed(0)
    setup_console(is_main=True)  # which announces the self-test of the kernels
    set_arithmetic(Config())
    return setup(device).device


def installed(package: str) -> str | None:
    """Version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def result_path(folder: Path, name: str, device: Mapping[str, object]) -> Path:
    """Where a benchmark writes its figures of today and of this device; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    where = re.sub("[^a-z0-9]+", "-", str(device.get("gpu", f"{device['cores']}-core-cpu")).lower())
    return folder / f"{name}-{time.strftime('%Y%m%d')}-{where}.json"


def write(path: Path, report: dict) -> None:
    """The figures as JSON; what it has no type for, such as paths, as text."""
    write_whole(path, json.dumps(report, indent=1, default=str) + "\n")


def runs_in(path: Path) -> list[dict]:
    """The `runs` that were written to `path` before, of a measurement that is made part by part."""
    return json.loads(path.read_text())["runs"] if path.exists() else []


def save_picture(figure: Figure, path: Path) -> None:
    """The picture beside the figures in `path`."""
    figure.savefig(path.with_suffix(".png"), dpi=110)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    values = list(values)
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def network(cfg: Config, **changes) -> nn.Module:
    """The network of a recipe, with further or other arguments of `create_model`; raises ValueError as that does."""
    settings = {key: getattr(cfg, key) for key in MODEL_FIELDS[1:] if getattr(cfg, key) is not None}
    return create_model(cfg.model, **settings | changes)


def random_batch(cfg: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise of the shape of a recipe's batch, images [B,C,H,W] or event frames [B,T,C,H,W], and labels [B]."""
    rng = torch.Generator().manual_seed(0)
    shape = (cfg.in_channels, cfg.input_size, cfg.input_size)
    if cfg.dataset in EVENT_DATASETS:
        mean = torch.full((cfg.batch_size, cfg.time_steps, *shape), 0.3)
        samples = torch.poisson(mean, generator=rng)  # counts of events
    else:
        samples = torch.randn(cfg.batch_size, *shape, generator=rng)
    return samples.to(device), torch.randint(cfg.num_classes, (cfg.batch_size,), generator=rng).to(device)


def train_step(model: nn.Module, amp: str, device: torch.device) -> Step:
    """Forward, loss, backward and AdamW, under a GradScaler with "fp16" on CUDA: the same for every network.

    It never waits for the device and keeps no tensor of its own, so that it can be captured in a CUDA graph.
    """
    model.train()
    is_cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True, capturable=is_cuda)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16" and is_cuda)

    def step(samples: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(amp, device):
            loss = F.cross_entropy(model(samples), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step


def eval_step(model: nn.Module, amp: str, device: torch.device) -> Step:
    """The forward pass as in an evaluation."""
    model.eval()

    @torch.inference_mode()
    def step(samples: Tensor, labels: Tensor) -> Tensor:
        with autocast(amp, device):
            return model(samples)

    return step


STEPS = {"train": train_step, "eval": eval_step}


class Timed:
    """A step on one batch: made, warmed up, and then timed in turns with others.

    Attributes:
        peak_bytes: on CUDA the most that it held at a time beyond what there was before it was made: weights, states
            of the optimizer, gradients and activations.
    """

    def __init__(self, make: Callable[[], Step], batch: tuple[Tensor, Tensor], device: torch.device):
        self.batch, self.device = batch, device
        is_cuda = device.type == "cuda"
        before = torch.cuda.memory_allocated(device) if is_cuda else 0
        self.step = make()
        self.step(*batch)  # convolutions try their algorithms here, with more memory than they take afterwards
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARM_UP[device.type]):
            self.step(*batch)
        self.peak_bytes = torch.cuda.max_memory_allocated(device) - before if is_cuda else None

    def turn(self, steps: int) -> float:
        """Mean time of a step (ms), over `steps` of them behind one that is not timed."""
        self.step(*self.batch)  # asks the device for memory, which `Turns` gives back between the turns
        elapsed = stopwatch(self.device)
        for _ in range(steps):
            self.step(*self.batch)
        return elapsed() / steps

    def close(self) -> None:
        """Nothing is left open."""


class Turns:
    """Sides that are timed in turns. One that fails is out, with its reason in `not_run`; the others go on.

    A side is what has `turn`, `peak_bytes` and `close` as `Timed` has them. Its figures stay behind the `with` block.
    """

    def __init__(self, title: str, device: torch.device):
        self.title, self.device = title, device
        self.running, self.not_run, self.peaks, self.milliseconds = {}, {}, {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        for name in list(self.running):
            self.running.pop(name).close()
        release(self.device)

    def start(self, name: str, make: Callable[[], Timed]) -> None:
        """Make a side ready to be timed."""
        print(f"{self.title}: {name} starts", flush=True)
        with self._noting(name):
            self.running[name] = make()
            self.peaks[name] = self.running[name].peak_bytes
        release(self.device)

    def round(self, steps: int) -> None:
        """A turn of `steps` steps for every side."""
        for name in list(self.running):
            with self._noting(name):
                self.milliseconds.setdefault(name, []).append(self.running[name].turn(steps))
            release(self.device)
        times = ", ".join(f"{name} {self.milliseconds[name][-1]:.2f}" for name in self.running)
        print(f"{self.title}: ms a step: {times}", flush=True)

    def figures(self, names: Iterable[str], baseline: str, samples: int) -> dict[str, dict]:
        """What was measured of each side, or why it did not run.

        Returns:
            `ms` a step with all `rounds`, `samples_per_s`, `peak_bytes`, and `ratio`: the baseline's times over those
            of the same rounds (None where the baseline did not run).
        """
        figures = {}
        for name in names:
            if name in self.not_run:
                figures[name] = {"not_run": self.not_run[name]}
            elif name in self.milliseconds:
                rounds = self.milliseconds[name]
                ms = spread(rounds)
                first = None if baseline in self.not_run else self.milliseconds[baseline]
                figures[name] = {
                    "ms": ms | {"rounds": rounds},
                    "samples_per_s": 1000 * samples / ms["median"],
                    "peak_bytes": self.peaks[name],
                    "ratio": first and spread(b / m for b, m in zip(first, rounds, strict=True)),
                }
        return figures

    @contextlib.contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, the other sides go on
            self.not_run[name] = reason(error)
            if name in self.running:
                self.running.pop(name).close()
            print(f"{self.title}: {name} does not run: {self.not_run[name]}", flush=True)
            if not isinstance(error, ValueError | ImportError | torch.OutOfMemoryError):
                traceback.print_exc()


def stopwatch(device: torch.device) -> Callable[[], float]:
    """Start to time what `device` does; the call that is returned waits for the end of it and gives the ms."""
    if device.type != "cuda":
        start = time.perf_counter()
        return lambda: 1000 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()

    def elapsed() -> float:
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last)

    return elapsed


def release(device: torch.device) -> None:
    """Give memory that nobody uses back to the device, where another process may need it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """Why a side did not run, in one line."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return "out of memory"
    what = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
    return f"{what}{' '.join(str(error).split())}"[:300]
