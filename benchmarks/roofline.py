"""The least time that a device could take for a step: what the step needs, and how fast the device is.

A network is a chain of units (`models.layers.ConvBN`): a convolution with input I and output O, then BatchNorm, then
pooling or not, then neurons with spikes S; all are counted in elements. An implementation that fuses all that can be
fused still moves, for each unit,

- in an evaluation I + S: BatchNorm is part of the convolution, and the neurons fire before anything is written;
- in training, forward, I + 3 O + S: the convolution reads I and writes O, which is read for the statistics of the batch
  and, once these are known, again for the spikes;
- in training, backward, 2 I + 5 O + 2 S: the neurons are computed once more from O, with the gradient of S, for the
  sums of BatchNorm's gradient and again for the gradient of O, which is written, and read for those of weights and of
  input; the former reads I, the latter is written.

A still image is the same at every time step, so the first unit's I and O count once; that its operations need only be
done once, too, is neglected (1 % of all). Left out are the products of the attentions, the sums of residuals, the head,
weights and optimizer: a few percent of the bytes of the published networks.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engine.config import Config
from models.layers import ConvBN

from .common import network, random_batch, release, stopwatch

MOVED = {"eval": (1, 0, 1), "train": (3, 8, 3)}  # how often I, O and S are moved
COUNTED = 2  # samples, because BatchNorm may refuse one
REPEATS = 20  # of a measured rate, of which the best is taken: others may use the machine, too
GEMM_SIZE, COPY_BYTES, CALLS = {"cpu": 1024, "cuda": 8192}, {"cpu": 2**27, "cuda": 2**32}, {"cpu": 1, "cuda": 10}


class Demand(NamedTuple):
    """What a sample takes: floating-point operations (a multiply-accumulate is two), and elements moved at least."""

    operations: int
    elements: int


class Rates(NamedTuple):
    """What a device does at best: bytes read and written a second, floating-point operations a second."""

    bytes_per_s: float
    operations_per_s: float

    def floor_ms(self, demand: Demand, samples: int, bytes_per_element: int) -> float:
        """The time below which no step can be, for it moves so many bytes and computes so much."""
        moved = demand.elements * bytes_per_element / self.bytes_per_s
        return 1000 * samples * max(moved, demand.operations / self.operations_per_s)


def demand(cfg: Config, mode: str) -> Demand:
    """What a step of a recipe's network takes per sample, counted on the unfused network without computing it."""
    model = network(cfg, lif_backend="torch").train(mode == "train").to("meta")
    convolved, elements = {}, 0  # of each convolution and of all units

    def keep(conv: nn.Module, _, y: Tensor) -> None:
        convolved[conv] = y.numel()

    def count(unit: nn.Module, inputs: tuple[Tensor], spikes: Tensor) -> None:
        nonlocal elements
        (x,) = inputs
        alike = len(x) if x.stride(0) == 0 else 1  # time steps that share one image
        sizes = x.numel() // alike, convolved[unit.conv] // alike, spikes.numel()
        elements += sum(times * size for times, size in zip(MOVED[mode], sizes, strict=True))

    for unit in model.modules():
        if isinstance(unit, ConvBN):
            unit.conv.register_forward_hook(keep)
            unit.register_forward_hook(count)
    samples, _ = random_batch(dataclasses.replace(cfg, batch_size=COUNTED), torch.device("meta"))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(mode == "train"):
        logits = model(samples)
        if mode == "train":
            logits.sum().backward()
    return Demand(counter.get_total_flops() // COUNTED, elements // COUNTED)


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of a large copy and of a large matrix product of random numbers on `device`, the best of a few."""
    rates = Rates(_copied(device, COPY_BYTES[device.type]), _multiplied(device, dtype, GEMM_SIZE[device.type]))
    release(device)
    return rates


def _copied(device: torch.device, length: int) -> float:
    """Bytes read and written a second."""
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * length / _best_seconds(lambda: target.copy_(source), device)


def _multiplied(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b), device)


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    calls, times = CALLS[device.type], []
    for _ in range(REPEATS + 1):  # the first of which warms up
        elapsed = stopwatch(device)
        for _ in range(calls):
            call()
        times.append(elapsed() / 1000 / calls)
    return min(times[1:])
