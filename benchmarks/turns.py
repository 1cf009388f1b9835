"""Timing of a network's steps, in turns with those of other sides."""

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from engine.trainer import autocast

from .common import release, spread, stopwatch

LR = 1e-4  # of the timed steps; any small value works on random labels
WARM_UP = {"cpu": 1, "cuda": 8}  # untimed steps that compile, choose algorithms and capture graphs

Step = Callable[..., object]  # of a batch: samples and labels


def train_step(model: nn.Module, amp: str, device: torch.device) -> Step:
    """Return a training step without synchronisation, so that a CUDA graph can capture it."""
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
    """Return the forward pass of an evaluation."""
    model.eval()

    @torch.inference_mode()
    def step(samples: Tensor, labels: Tensor) -> Tensor:
        with autocast(amp, device):
            return model(samples)

    return step


STEPS = {"train": train_step, "eval": eval_step}


def kept_bytes(step: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward pass of a step, without those of `parameters`."""
    kept, excluded = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()  # each storage once
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        step()
    return sum(size for address, size in kept.items() if address not in excluded)


class Timed:
    """Step on one batch, warmed up and ready for timing in turns with others.

    Attributes:
        peak_bytes: on CUDA the peak memory of a step, with all that `make` allocates; on a CPU the bytes kept for the
            backward pass, if `parameters` are given.
    """

    def __init__(
        self,
        make: Callable[[], Step],
        batch: Sequence[Tensor],
        device: torch.device,
        parameters: Iterable[Tensor] | None = None,
    ):
        self.batch, self.device, self.peak_bytes = batch, device, None
        is_cuda = device.type == "cuda"
        before = torch.cuda.memory_allocated(device) if is_cuda else 0
        self.step = make()
        self.step(*batch)  # convolutions try algorithms here, which takes extra memory
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARM_UP[device.type]):
            self.step(*batch)
        if is_cuda:
            self.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        elif parameters is not None:
            self.peak_bytes = kept_bytes(lambda: self.step(*batch), parameters)

    def turn(self, steps: int) -> float:
        """Return the mean time of `steps` steps (ms), after an untimed one."""
        self.step(*self.batch)  # allocates the memory that `Turns` releases between the turns
        elapsed = stopwatch(self.device)
        for _ in range(steps):
            self.step(*self.batch)
        return elapsed() / steps

    def close(self) -> None:
        """Do nothing; `Remote` ends its process."""


class Turns:
    """Context that times sides (such as `Timed`) in turns; `not_run` holds the errors of sides that failed."""

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
        """Create a side and warm it up."""
        print(f"{self.title}: {name} starts", flush=True)
        with self._noting(name):
            self.running[name] = make()
            self.peaks[name] = self.running[name].peak_bytes

    def round(self, steps: int) -> None:
        """Give every side a turn of `steps` steps."""
        for name in list(self.running):
            with self._noting(name):
                self.milliseconds.setdefault(name, []).append(self.running[name].turn(steps))
        times = ", ".join(f"{name} {self.milliseconds[name][-1]:.2f}" for name in self.running)
        print(f"{self.title}: ms a step: {times}", flush=True)

    def figures(self, names: Iterable[str], baseline: str, samples: int) -> dict[str, dict]:
        """Return the figures of each side, or its error as `not_run`; `ratio` is the baseline's time over `ms`."""
        figures = {}
        first = None if baseline in self.not_run else self.milliseconds.get(baseline)
        for name in names:
            if name in self.not_run:
                figures[name] = {"not_run": self.not_run[name]}
            elif name in self.milliseconds:
                ms = spread(self.milliseconds[name])
                figures[name] = {
                    "ms": ms | {"rounds": self.milliseconds[name]},
                    "samples_per_s": 1000 * samples / ms["median"],
                    "peak_bytes": self.peaks[name],
                    "ratio": first and spread(b / m for b, m in zip(first, self.milliseconds[name], strict=True)),
                }
        return figures

    @contextlib.contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the other sides go on
            self.not_run[name] = reason(error)
            if name in self.running:
                self.running.pop(name).close()
            print(f"{self.title}: {name} failed: {self.not_run[name]}", flush=True)
            if not isinstance(error, ValueError | ImportError | torch.OutOfMemoryError):
                traceback.print_exc()
        release(self.device)


def reason(error: Exception) -> str:
    """Return an error in one line."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return "out of memory"
    what = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
    return f"{what}{' '.join(str(error).split())}"[:300]
