"""Least time of a step on a device, from the step's demand and the device's rates.

A network is a chain of units (`models.layers.ConvBN`): a convolution with input I and output O, BatchNorm, optional
pooling, and neurons with spikes S, all in elements. Even a fully fused implementation moves, for each unit,

- in evaluation I + S: BatchNorm folds into the convolution, and the neurons run before anything is written;
- in the forward pass of training I + 3 O + S: O is written, read for the batch statistics, and read for the spikes;
- in the backward pass 2 I + 5 O + 2 S: O and S's gradient are read twice, for BatchNorm's sums and for O's gradient.
  O's gradient is written, then read for the gradients of weights (with I) and input (written).

A static image is the same at every time step, so I and O of the first unit count once; its operations count T times
(1 % of all). The demand omits attention products, residual sums, head, weights and optimizer, a few percent of bytes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from engine.config import Config
from models.layers import ConvBN

from .common import network, random_batch

MOVED = {"eval": (1, 0, 1), "train": (3, 8, 3)}  # how often I, O and S are moved
COUNTED = 2  # samples, because BatchNorm may reject a single one
GEMM_SIZE, COPY_BYTES = {"cpu": 1024, "cuda": 8192}, {"cpu": 2**27, "cuda": 2**32}


class Demand(NamedTuple):
    """Least work for a sample."""

    operations: int  # floating-point, a multiply-accumulate is two
    elements: int  # moved


class Rates(NamedTuple):
    """Best rates of a device."""

    bytes_per_s: float  # read and written
    operations_per_s: float

    def floor_ms(self, demand: Demand, samples: int, bytes_per_element: int) -> float:
        """Return the least time of a step."""
        moved = demand.elements * bytes_per_element / self.bytes_per_s
        return 1000 * samples * max(moved, demand.operations / self.operations_per_s)


def demand(cfg: Config, mode: str) -> Demand:
    """Count the demand of a step per sample, on the meta device."""
    model = network(cfg, lif_backend="torch").train(mode == "train").to("meta")
    convolved, elements = {}, []  # of each convolution; of all units

    def count(unit: nn.Module, inputs: tuple[Tensor], spikes: Tensor) -> None:
        same_steps = len(inputs[0]) if inputs[0].stride(0) == 0 else 1  # time steps that share one image
        sizes = inputs[0].numel() // same_steps, convolved[unit.conv] // same_steps, spikes.numel()
        elements.append(sum(times * size for times, size in zip(MOVED[mode], sizes, strict=True)))

    for unit in model.modules():
        if isinstance(unit, ConvBN):
            unit.conv.register_forward_hook(lambda conv, _, y: convolved.update({conv: y.numel()}))
            unit.register_forward_hook(count)
    samples, _ = random_batch(cfg, torch.device("meta"), COUNTED)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(mode == "train"):
        logits = model(samples)
        if mode == "train":
            logits.sum().backward()
    return Demand(counter.get_total_flops() // COUNTED, sum(elements) // COUNTED)


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure a large copy and a large matrix product; the best time counts, because the machine may be shared."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * len(source) / _best_seconds(lambda: target.copy_(source))
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    multiplied = 2 * size**3 / _best_seconds(lambda: torch.mm(a, b))
    return Rates(copied, multiplied)


def _best_seconds(call: Callable[[], object]) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.5).times)
