"""Host functions of several kernels: the division of work into programs."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

CHUNK = 16  # steps whose membranes the backward pass keeps in registers; longer runs have several chunks
WARPS = 4  # at most, in a program
PROGRAMS = 1024  # about the least number of programs, and the most in a reduction
COLUMNS_FIRST = False  # neighbouring programs take columns of the same rows if a tile's rows have 64 bytes


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Tiling(NamedTuple):
    """Rows and channels in tiles of BR x BC; each program takes `tiles` of them in sequence."""

    grid: tuple[int, int]
    warps: int
    blocks: tuple[int, ...]  # last arguments of a kernel: tile sizes, and for some the grid's axis along the rows
    tiles: int
    programs: int  # along the rows

    def launch(self, kernel: KernelInterface, *arguments) -> None:
        """Launch a kernel, a microsecond faster than `kernel[grid]`, which creates a function."""
        kernel.run(*arguments, *self.blocks, grid=self.grid, num_warps=self.warps, warmup=False)


def tiling(rows: int, channels: int, per_thread: int, reduce: bool = False) -> Tiling:
    """Return tiles of `per_thread` elements a thread; in a reduction a program takes several, to write few results."""
    return _tiling(rows, channels, per_thread, reduce, PROGRAMS, WARPS, COLUMNS_FIRST)


@functools.cache  # else a launch spends most of its time here
def _tiling(rows: int, channels: int, per_thread: int, reduce: bool, *constants: int) -> Tiling:
    warps = warps_for(rows * channels, per_thread)
    tile = warps * 32 * per_thread
    BC = min((min(tile, 128), 64, 32), key=lambda block: cdiv(channels, block) * block)
    BR = max(1, tile // BC)
    tiles = tiles_for(rows, BR) if reduce else 1
    programs, columns = cdiv(rows, BR * tiles), cdiv(channels, BC)
    columns_first = COLUMNS_FIRST and BC == 32 and programs < 2**16  # the limit of a grid's second axis
    grid = (columns, programs) if columns_first else (programs, columns)
    return Tiling(grid, warps, (BR, BC, int(columns_first)), tiles, programs)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up; `triton.cdiv` takes 5 us on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n and 1; `triton.next_power_of_2` takes 5 us on the host."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(elements: int, per_thread: int) -> int:
    """Return the warps of a program: `WARPS`, or fewer to fill the device with programs."""
    return min(WARPS, next_power_of_2(elements // (PROGRAMS * 32 * per_thread)))


def tiles_for(rows: int, block: int) -> int:
    """Return the blocks of rows for each of about `PROGRAMS` programs."""
    return next_power_of_2(cdiv(rows, block * PROGRAMS))


@functools.cache
def per_thread(steps: int, values: int = 1) -> int:
    """Return the elements of a thread that keeps `values` membranes of each in registers, for all steps."""
    return max(2, min(16, 32 // (values * next_power_of_2(steps))))
