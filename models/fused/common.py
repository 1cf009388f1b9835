"""What the kernels share: the neuron's equations, and how the work is cut into programs."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16  # steps whose membranes the backward pass holds in registers; longer runs go from chunk to chunk
FORWARD_TILE = 2048  # elements of a step that a program computes at a time
BACKWARD_TILE = 4096  # the same, times the steps in a chunk
PROGRAMS = 1024  # tiles shrink until there are about so many programs, and so many share a reduction


@triton.jit
def charge(u, v):
    """The membrane before the spike, from current and membrane; tau is 2."""
    return v + (u - v) * 0.5


@triton.jit
def charge_gradient(grad_spike, over_threshold, grad_v):
    """Gradient of the charged membrane; half of it goes to the current, half to the membrane of the step before.

    Args:
        grad_v: of the membrane behind the reset, which passes where there was no spike.
    """
    sigmoid = tl.sigmoid(over_threshold * 4.0)  # alpha is 4
    return grad_spike * (1 - sigmoid) * sigmoid * 4.0 + tl.where(over_threshold < 0, grad_v, 0.0)


@triton.jit
def load_norm(norm, c, C, ACC: tl.constexpr):
    """Mean, 1 / standard deviation, gamma and beta of channels c from `norm` [4,C]."""
    inside = c < C
    mean = tl.load(norm + c, inside, 0.0).to(ACC)
    rstd = tl.load(norm + C + c, inside, 0.0).to(ACC)
    gamma = tl.load(norm + 2 * C + c, inside, 0.0).to(ACC)
    return mean, rstd, gamma, tl.load(norm + 3 * C + c, inside, 0.0).to(ACC)


def accumulator(x: Tensor) -> tuple[torch.dtype, tl.dtype]:
    """The dtype to compute in, for torch and for Triton."""
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


class Tiling(NamedTuple):
    """How R rows of C channels are cut: tiles of BR x BC, `tiles` of them one after the other in each program."""

    BR: int
    BC: int
    tiles: int
    programs: int  # along the rows
    columns: int  # programs along the channels
    warps: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.programs, self.columns


def tiling(rows: int, channels: int, tile: int, reduce: bool = False) -> Tiling:
    """Tiles of at most `tile` elements; in a reduction a program takes several, so that few partial results are left."""
    columns = min((128, 64, 32), key=lambda block: triton.cdiv(channels, block) * block)
    wanted = triton.next_power_of_2(max(1, rows * channels // PROGRAMS))
    block = max(1, min(tile, max(128, wanted)) // columns)
    per_program = max(1, triton.next_power_of_2(triton.cdiv(rows, block * PROGRAMS))) if reduce else 1
    programs = triton.cdiv(rows, block * per_program)
    warps = max(1, min(4, block * columns // 256))
    return Tiling(block, columns, per_program, programs, triton.cdiv(channels, columns), warps)
