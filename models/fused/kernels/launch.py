"""Host functions shared by the kernels: the division of work into programs."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

CHUNK = 16  # steps whose membranes the backward pass holds in registers; longer runs go from chunk to chunk
WARPS = 4  # of a program, at most
PROGRAMS = 1024  # tiles shrink until there are about so many programs, and so many share a reduction
COLUMNS_FIRST = False  # neighbouring programs take the columns of the same rows where a piece of a row is 64 bytes


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype to compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Tiling(NamedTuple):
    """R rows of C channels in tiles of BR x BC, of which each program takes `tiles`, one after the other."""

    grid: tuple[int, int]
    warps: int
    blocks: tuple[int, ...]  # last arguments of a kernel: a tile's sizes, perhaps the grid's axis ROWS along the rows
    tiles: int
    programs: int  # along the rows

    def launch(self, kernel: KernelInterface, *arguments) -> None:
        """Launch a kernel. `kernel[grid]` makes a function first, which takes the host a microsecond."""
        kernel.run(*arguments, *self.blocks, grid=self.grid, num_warps=self.warps, warmup=False)


def tiling(rows: int, channels: int, per_thread: int, reduce: bool = False) -> Tiling:
    """Tiles of `per_thread` elements a thread; in a reduction a program takes several, so that few results are left."""
    return _tiling(rows, channels, per_thread, reduce, PROGRAMS, WARPS, COLUMNS_FIRST)


@functools.cache  # one entry for each shape; a launch would spend most of its time here
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
    """a / b, rounded up. `triton.cdiv` takes 5 us on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1. `triton.next_power_of_2` takes 5 us on the host."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(elements: int, per_thread: int) -> int:
    """At most `WARPS`, and fewer where there would not be enough programs."""
    return min(WARPS, next_power_of_2(elements // (PROGRAMS * 32 * per_thread)))


def tiles_for(rows: int, block: int) -> int:
    """Blocks of rows for each of about `PROGRAMS` programs."""
    return next_power_of_2(cdiv(rows, block * PROGRAMS))


@functools.cache
def per_thread(steps: int, values: int = 1) -> int:
    """Elements a thread can take of which it holds `values` membranes in registers for each of the steps."""
    return max(2, min(16, 32 // (values * next_power_of_2(steps))))
