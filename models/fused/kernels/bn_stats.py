"""Statistics of BatchNorm as the `norm` of other kernels: from all rows in training, else the running ones.

T equal time steps are computed once. They change only the count in the unbiased running variance.
"""

import functools
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from .device import accumulator_of
from .launch import Tiling, accumulator, cdiv, next_power_of_2, tiling

_NAMES = itemgetter("running_mean", "running_var", "num_batches_tracked", "weight", "bias")


class Norm(NamedTuple):
    """BatchNorm, and the bias of the convolution before it, which the fused path does not add to y."""

    bn: nn.modules.batchnorm._BatchNorm
    bias: Tensor | None


@triton.jit(do_not_specialize=["M"])
def _moments_kernel(
    y, moments, M, C, TILES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write mean and sum of squared deviations of each program's rows to `moments` [2,programs,C].

    Sums are relative to the first row.
    """
    ACC: tl.constexpr = accumulator_of(y.dtype)
    program = tl.program_id(ROWS).to(tl.int64)
    first = program * TILES * BR
    c = tl.program_id(1 - ROWS) * BC + tl.arange(0, BC)
    origin = tl.load(y + first * C + c, c < C, 0.0).to(ACC)
    total = tl.zeros((BR, BC), ACC)
    square = tl.zeros((BR, BC), ACC)
    for tile in range(TILES):
        r = first + tile * BR + tl.arange(0, BR)[:, None]
        inside = (r < M) & (c[None, :] < C)
        x = tl.load(y + r * C + c[None, :], inside, 0.0).to(ACC)
        x = tl.where(inside, x - origin[None, :], 0.0)
        total += x
        square += x * x
    n = tl.minimum(M - first, TILES * BR).to(ACC)
    offset = tl.sum(total, 0) / n
    out = moments + program * C + c
    tl.store(out, origin + offset, c < C)
    tl.store(out + tl.num_programs(ROWS) * C, tl.sum(square, 0) - offset * offset * n, c < C)


@triton.jit(do_not_specialize=["rows", "P"])
def _norm_kernel(
    moments, counts, norms, norm, rows, P, C, PART: tl.constexpr, T: tl.constexpr, CONSTANTS: tl.constexpr,
    TILES: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write `norm` [4,width] of several BatchNorms of C channels each; in training from `moments` [2,P,width].

    CONSTANTS holds eps and momentum of each. Each part has PART of the `rows` rows, the last one less, or `counts` [P].
    Sums over the parts are relative to the first part's mean.
    """
    ACC: tl.constexpr = accumulator_of(norm.dtype)
    width = len(norms) * C
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    for i in tl.static_range(len(norms)):
        if tl.program_id(1) == i:
            running_mean, running_var, batches, gamma, beta = norms[i][:5]
            column = i * C + c
            shift = tl.zeros((BC,), ACC)
            if len(norms[i]) > 5:
                shift = tl.load(norms[i][5] + c, inside, 0.0).to(ACC)
            mean = tl.load(running_mean + c, inside, 0.0).to(ACC)
            var = tl.load(running_var + c, inside, 1.0).to(ACC)
            if moments is not None:
                origin = tl.load(moments + column, inside, 0.0)[None, :]
                numbers = tl.zeros((BP, 1), ACC)
                sums = tl.zeros((BP, BC), ACC)
                deviations = tl.zeros((BP, BC), ACC)
                for tile in range(TILES):
                    p = tile * BP + tl.arange(0, BP)[:, None]
                    there = (p < P) & inside[None, :]
                    at = p * width + column[None, :]
                    if counts is None:
                        n = tl.where(p < P, tl.minimum(rows - p * PART, PART), 0).to(ACC)
                    else:
                        n = tl.load(counts + p, p < P, 0.0)
                    far = tl.load(moments + at, there, 0.0) - origin
                    numbers += n
                    sums += n * far
                    deviations += tl.load(moments + P * width + at, there, 0.0) + n * far * far
                count = tl.sum(tl.sum(numbers, 1), 0)
                offset = tl.sum(sums, 0) / count
                square = tl.sum(deviations, 0) - offset * offset * count
                batch_mean = tl.load(moments + column, inside, 0.0) + offset
                tl.store(batches, tl.load(batches) + 1, tl.program_id(0) == 0)
                tl.store(running_mean + c, mean + (batch_mean + shift - mean) * CONSTANTS[i][1], inside)
                tl.store(running_var + c, var + (square / (count - 1.0 / T) - var) * CONSTANTS[i][1], inside)
                mean = batch_mean
                var = square / count
            else:
                mean -= shift
            out = norm + column
            tl.store(out, mean, inside)
            tl.store(out + width, 1.0 / tl.sqrt(var + CONSTANTS[i][0]), inside)
            tl.store(out + 2 * width, tl.load(gamma + c, inside, 0.0).to(ACC), inside)
            tl.store(out + 3 * width, tl.load(beta + c, inside, 0.0).to(ACC), inside)


def norm_of(y: Tensor, norms: Sequence[Norm], shown: int) -> tuple[Tensor, int | Tensor | None]:
    """Return `norm` [4,C] for y [..., C], and the number of rows in its statistics; update running statistics.

    The number is a tensor under SyncBatchNorm, whose ranks may have different numbers of rows, and None in evaluation.

    Args:
        norms: BatchNorms of consecutive channels.
        shown: number of equal time steps that y stands for.
    """
    dtype, width, first = accumulator(y), y.shape[-1], norms[0].bn
    rows = y.numel() // width
    moments = counts = count = None
    parts, part = 0, 1
    if first.training:
        if rows * shown == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}")
        tiles = tiling(rows, width, 16, reduce=True)
        parts, part = tiles.programs, tiles.blocks[0] * tiles.tiles
        moments = y.new_empty((2, parts, width), dtype=dtype)
        tiles.launch(_moments_kernel, y, moments, rows, width, tiles.tiles)
        count = rows
        is_shared = isinstance(first, nn.SyncBatchNorm) and torch.distributed.is_initialized()
        if is_shared and torch.distributed.get_world_size(first.process_group) > 1:
            moments, counts = _gathered(moments, part, rows, first.process_group)
            parts, count = len(counts), counts.sum()
    norm = y.new_empty((4, width), dtype=dtype)
    channels = width // len(norms)
    tiles = _norm_tiling(parts, channels, len(norms))
    constants = part, shown, tuple([(bn.eps, bn.momentum) for bn, _ in norms]), tiles.tiles
    tiles.launch(_norm_kernel, moments, counts, tuple(map(_tensors, norms)), norm, rows, parts, channels, *constants)
    return norm, count


@functools.cache
def _norm_tiling(parts: int, channels: int, norms: int) -> Tiling:
    """Return tiles of BP parts and BC channels of one norm."""
    BP, BC = min(1024, next_power_of_2(parts)), 8
    return Tiling((cdiv(channels, BC), norms), 8 if BP >= 512 else 4, (BP, BC), tiles=cdiv(parts, BP), programs=1)


def _tensors(norm: Norm) -> tuple[Tensor, ...]:
    """Return statistics, gamma, beta and bias; attribute look-ups would take half a microsecond each."""
    tensors = _NAMES(norm.bn._buffers | norm.bn._parameters)
    return tensors if norm.bias is None else (*tensors, norm.bias)


def _gathered(
    moments: Tensor, part: int, rows: int, group: torch.distributed.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return moments [2,ranks,C] and numbers of rows [ranks] of all ranks; this rank has `rows`, in parts of `part`."""
    means, squares = moments
    n = (rows - part * torch.arange(len(means), device=moments.device)).clamp(max=part)[:, None]
    mean = (n * means).sum(0) / rows
    square = squares.sum(0) + (n * (means - mean).square()).sum(0)
    local = torch.stack([mean, square, torch.full_like(mean, rows)])
    received = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(received, local, group)
    means, squares, counts = torch.stack(received, 1)  # each [ranks,C]
    return torch.stack([means, squares]), counts[:, 0].contiguous()
