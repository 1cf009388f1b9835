"""The statistics of BatchNorm: from all rows in training, else the running ones, as the `norm` the kernels take.

Rows that are shown T times over give the same mean and variance as once; only the unbiased variance that enters the
running one has T times the count.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from .common import accumulator, tiling


class Norm(NamedTuple):
    """A BatchNorm, and the bias of the convolution before it, which the fused path does not add to y."""

    bn: nn.modules.batchnorm._BatchNorm
    bias: Tensor | None


@triton.jit(do_not_specialize=["M"])
def _moments_kernel(
    y, means, squares, M, C, BR: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr, ACC: tl.constexpr
):
    """Mean of each program's rows, and the sum of squared deviations from it; sums are relative to the first row."""
    first = tl.program_id(0).to(tl.int64) * TILES * BR
    c = tl.program_id(1) * BC + tl.arange(0, BC)
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
    out = tl.program_id(0).to(tl.int64) * C + c
    tl.store(means + out, origin + offset, c < C)
    tl.store(squares + out, tl.sum(square, 0) - offset * offset * n, c < C)


@triton.jit(do_not_specialize=["rows", "P", "per_rank"])
def _norm_kernel(
    means, squares, running_mean, running_var, batches, gamma, beta, bias, norm, rows, P, per_rank, start, width, C,
    PART: tl.constexpr, T: tl.constexpr, EPS: tl.constexpr, MOMENTUM: tl.constexpr, TRAIN: tl.constexpr,
    BIAS: tl.constexpr, BLOCKS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One BatchNorm's columns of `norm` [4,width], from `start` on; in training from P partial moments.

    Each part has PART rows, but for the last of each rank's `per_rank` parts: a rank has `rows` in all.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    shift = tl.zeros((BC,), ACC)
    if BIAS:
        shift = tl.load(bias + c, inside, 0.0).to(ACC)
    old_mean = tl.load(running_mean + c, inside, 0.0).to(ACC)
    mean = old_mean - shift
    var = tl.load(running_var + c, inside, 1.0).to(ACC)
    if TRAIN:
        count = tl.zeros((BC,), ACC)
        new_mean = tl.zeros((BC,), ACC)
        for block in range(BLOCKS):
            p = block * BP + tl.arange(0, BP)[:, None]
            n = tl.where(p < P, tl.minimum(rows - p % per_rank * PART, PART), 0).to(ACC)
            at = p * width + start + c[None, :]
            count += tl.sum(n, 0)
            new_mean += tl.sum(n * tl.load(means + at, (p < P) & inside[None, :], 0.0), 0)
        new_mean /= count
        square = tl.zeros((BC,), ACC)
        for block in range(BLOCKS):
            p = block * BP + tl.arange(0, BP)[:, None]
            n = tl.where(p < P, tl.minimum(rows - p % per_rank * PART, PART), 0).to(ACC)
            at = p * width + start + c[None, :]
            there = (p < P) & inside[None, :]
            far = tl.load(means + at, there, 0.0) - new_mean[None, :]
            square += tl.sum(tl.load(squares + at, there, 0.0) + n * far * far, 0)
        unbiased = square / (count - 1.0 / T)
        tl.store(batches, tl.load(batches) + 1, tl.program_id(0) == 0)
        tl.store(running_mean + c, old_mean + (new_mean + shift - old_mean) * MOMENTUM, inside)
        tl.store(running_var + c, var + (unbiased - var) * MOMENTUM, inside)
        mean = new_mean
        var = square / count
    out = norm + start + c
    tl.store(out, mean, inside)
    tl.store(out + width, 1.0 / tl.sqrt(var + EPS), inside)
    tl.store(out + 2 * width, tl.load(gamma + c, inside, 0.0).to(ACC), inside)
    tl.store(out + 3 * width, tl.load(beta + c, inside, 0.0).to(ACC), inside)


def norm_of(y: Tensor, norms: Sequence[Norm], shown: int) -> tuple[Tensor, int]:
    """`norm` [4,C] for y [..., C], whose channels are those of `norms` one after the other; updates running statistics.

    Args:
        shown: at how many time steps y is shown, where it holds them once for all.

    Returns:
        `norm`, and how many rows its statistics come from (over all processes under SyncBatchNorm); 0 in evaluation.

    Raises:
        ValueError: a single value per channel in training.
    """
    dtype, acc = accumulator(y)
    width = y.shape[-1]
    rows = y.numel() // width
    first = norms[0].bn
    means = squares = None
    count, parts, part, ranks = 0, 0, 1, 1
    if first.training:
        if rows * shown == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}")
        tiles = tiling(rows, width, 16, reduce=True)
        parts, part = tiles.programs, tiles.BR * tiles.tiles
        moments = y.new_empty((2, parts, width), dtype=dtype)
        _moments_kernel[tiles.grid](
            y, moments[0], moments[1], rows, width, BR=tiles.BR, BC=tiles.BC, TILES=tiles.tiles, ACC=acc,
            num_warps=tiles.warps,
        )  # fmt: skip
        ranks = synchronised(first)
        if ranks > 1:
            moments = torch.cat(all_gather(moments, first.process_group), 1)
        means, squares = moments
        count = rows * ranks
    norm = y.new_empty((4, width), dtype=dtype)
    start, BP, BC = 0, 128, 16
    for bn, bias in norms:
        channels = bn.num_features
        _norm_kernel[(triton.cdiv(channels, BC),)](
            means, squares, bn.running_mean, bn.running_var, bn.num_batches_tracked, bn.weight, bn.bias, bias, norm,
            rows, parts * ranks, parts, start, width, channels,
            PART=part, T=shown, EPS=bn.eps, MOMENTUM=bn.momentum, TRAIN=bn.training, BIAS=bias is not None,
            BLOCKS=triton.next_power_of_2(triton.cdiv(max(1, parts * ranks), BP)), BP=BP, BC=BC, ACC=acc,
        )  # fmt: skip
        start += channels
    return norm, count


def synchronised(bn: nn.Module) -> int:
    """Over how many processes the BatchNorm takes its statistics, as one with a `process_group` does."""
    if not hasattr(bn, "process_group") or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size(bn.process_group)


def all_gather(x: Tensor, group: torch.distributed.ProcessGroup | None) -> list[Tensor]:
    """x of every process."""
    received = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(received, x, group)
    return received
