"""What the kernels share: the neuron's equations, and how the work is cut into programs."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16  # steps whose membranes the backward pass holds in registers; longer runs go from chunk to chunk
WARPS = 4  # of a program, at most
PROGRAMS = 1024  # tiles shrink until there are about so many programs, and so many share a reduction


@triton.jit
def charge(u, v):
    """The membrane before the spike, from current and membrane; tau is 2."""
    return v + (u - v) * 0.5


@triton.jit
def reset(h, THRESHOLD: tl.constexpr):
    """The membrane after the spike, from the charged one."""
    return tl.where(h >= THRESHOLD, 0.0, h)


@triton.jit
def charge_gradient(grad_spike, over_threshold, grad_v):
    """Gradient of the charged membrane; half of it goes to the current, half to the membrane of the step before.

    Args:
        grad_v: of the membrane behind the reset, which passes where there was no spike.
    """
    e = tl.exp(tl.abs(over_threshold) * -4.0)  # alpha is 4; sigmoid' is e / (1 + e)^2 on either side
    r = 1.0 / (1.0 + e)
    return grad_spike * (4.0 * e * r * r) + tl.where(over_threshold < 0, grad_v, 0.0)


@triton.jit
def load_norm(norm, c, C, ACC: tl.constexpr):
    """A tuple: mean, 1 / standard deviation, gamma and beta of channels c from `norm` [4,C]."""
    inside = c < C
    mean = tl.load(norm + c, inside, 0.0).to(ACC)
    rstd = tl.load(norm + C + c, inside, 0.0).to(ACC)
    gamma = tl.load(norm + 2 * C + c, inside, 0.0).to(ACC)
    return mean, rstd, gamma, tl.load(norm + 3 * C + c, inside, 0.0).to(ACC)


@triton.jit
def normalised(y, norm):
    """What BatchNorm makes of y, with the tuple of `load_norm`."""
    return (y - norm[0]) * (norm[1] * norm[2]) + norm[3]


@triton.jit
def load_means(total, c, C, M, CENTRE: tl.constexpr, ACC: tl.constexpr):
    """A tuple: means over M rows of the gradients of beta and gamma, `total` [2,C]; empty without CENTRE."""
    means = ()
    if CENTRE:
        of_beta = tl.load(total + c, c < C, 0.0).to(ACC) / M.to(ACC)
        means = (of_beta, tl.load(total + C + c, c < C, 0.0).to(ACC) / M.to(ACC))
    return means


@triton.jit
def through_norm(g, x, norm, means, CENTRE: tl.constexpr):
    """Gradient of y from that of what BatchNorm makes of it; x is (y - mean) / standard deviation."""
    if CENTRE:
        g = g - means[0] - x * means[1]
    return g * (norm[1] * norm[2])


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


def tiling(rows: int, channels: int, per_thread: int, reduce: bool = False) -> Tiling:
    """Tiles of `per_thread` elements a thread; in a reduction a program takes several, so that few results are left."""
    warps = warps_for(rows * channels, per_thread)
    tile = warps * 32 * per_thread
    columns = min((min(tile, 128), 64, 32), key=lambda block: triton.cdiv(channels, block) * block)
    block = max(1, tile // columns)
    tiles = tiles_for(rows, block) if reduce else 1
    programs = triton.cdiv(rows, block * tiles)
    return Tiling(block, columns, tiles, programs, triton.cdiv(channels, columns), warps)


def warps_for(elements: int, per_thread: int) -> int:
    """At most `WARPS`, and fewer where there would not be enough programs."""
    return max(1, min(WARPS, triton.next_power_of_2(elements // (PROGRAMS * 32 * per_thread))))


def tiles_for(rows: int, block: int) -> int:
    """How many blocks of rows each of about `PROGRAMS` programs takes."""
    return triton.next_power_of_2(max(1, triton.cdiv(rows, block * PROGRAMS)))


def per_thread(steps: int, values: int = 1) -> int:
    """Elements a thread can take of which it holds `values` membranes in registers for each of the steps."""
    return max(2, min(16, 32 // (values * triton.next_power_of_2(steps))))
