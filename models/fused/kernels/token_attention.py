"""Q-K token attention in one kernel: BatchNorm and neurons of query and key, sums over the heads, their neurons, mask.

Shapes: y [T,R,2C] holds query and key before BatchNorm, R = B*H*W tokens; the result is [T,R,C]. T <= `CHUNK`.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...neuron import ATTN_THRESHOLD, THRESHOLD
from . import device
from .launch import Tiling, cdiv, next_power_of_2, per_thread, tiles_for, warps_for


@triton.jit
def _charges(y_q, y_k, inside, norm_q, norm_k, v_q, v_k, v_a, THRESHOLD: tl.constexpr, ACC: tl.constexpr):
    """Return the charged membranes of query, key and head at a step."""
    h_q = device.charge(device.normalised(y_q.to(ACC), norm_q), v_q)
    h_k = device.charge(device.normalised(y_k.to(ACC), norm_k), v_k)
    fired = tl.where(inside & (h_q >= THRESHOLD), 1.0, 0.0).to(ACC)
    return h_q, h_k, device.charge(tl.sum(fired, 2, keep_dims=True), v_a)


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    y, norm, out, R, C, HEADS, D: tl.constexpr, THRESHOLD: tl.constexpr, ATTN: tl.constexpr, T: tl.constexpr,
    GROUP: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = device.accumulator_of(y.dtype)
    r = (tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR))[:, None, None]
    head = (tl.program_id(1) * BH + tl.arange(0, BH))[None, :, None]
    d = tl.arange(0, BD)[None, None, :]
    c = head * D + d
    there = (head < HEADS) & (d < D)
    inside = (r < R) & there
    norm_q = device.load_norm(norm, c, 2 * C, ACC)
    norm_k = device.load_norm(norm, c + C, 2 * C, ACC)
    size = R.to(tl.int64) * C
    v_q = tl.zeros((BR, BH, BD), ACC)
    v_k = tl.zeros((BR, BH, BD), ACC)
    v_a = tl.zeros((BR, BH, 1), ACC)
    at = r * (2 * C) + c
    for first in tl.static_range(0, T, GROUP):
        y_q = device.load_steps(y, at, 2 * size, first, inside, T, GROUP)
        y_k = device.load_steps(y, at + C, 2 * size, first, inside, T, GROUP)
        for t in tl.static_range(first, first + GROUP):
            h_q, h_k, h_a = _charges(
                y_q[t - first], y_k[t - first], inside, norm_q, norm_k, v_q, v_k, v_a, THRESHOLD, ACC
            )
            v_q = device.reset(h_q, THRESHOLD)
            v_k = device.reset(h_k, THRESHOLD)
            v_a = device.reset(h_a, ATTN)
            passes = (h_a >= ATTN) & (h_k >= THRESHOLD)
            tl.store(out + t * size + r * C + c, tl.where(passes, 1.0, 0.0), device.until(T, t, inside, GROUP))


@triton.jit(do_not_specialize=["R", "M"])
def _backward_kernel(
    y, norm, grad_out, total, partial, grad, R, C, HEADS, M, D: tl.constexpr, THRESHOLD: tl.constexpr,
    ATTN: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, BR: tl.constexpr,
    BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write sums over the rows to `partial` [programs,2,2C], or else the gradient of y; see `bn_lif`."""
    ACC: tl.constexpr = device.accumulator_of(y.dtype)
    program = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BH + tl.arange(0, BH))[None, :, None]
    d = tl.arange(0, BD)[None, None, :]
    c = head * D + d
    there = (head < HEADS) & (d < D)
    norm_q = device.load_norm(norm, c, 2 * C, ACC)
    norm_k = device.load_norm(norm, c + C, 2 * C, ACC)
    size = R.to(tl.int64) * C
    sum_q = tl.zeros((BR, BH, BD), ACC)
    sum_qx = tl.zeros((BR, BH, BD), ACC)
    sum_k = tl.zeros((BR, BH, BD), ACC)
    sum_kx = tl.zeros((BR, BH, BD), ACC)
    means_q = device.load_means(total, c, 2 * C, M, ACC)
    means_k = device.load_means(total, c + C, 2 * C, M, ACC)
    for tile in range(TILES):
        r = ((program * TILES + tile) * BR + tl.arange(0, BR))[:, None, None]
        inside = (r < R) & there
        v_q = tl.zeros((BR, BH, BD), ACC)
        v_k = tl.zeros((BR, BH, BD), ACC)
        v_a = tl.zeros((BR, BH, 1), ACC)
        charges = ()
        at = r * (2 * C) + c
        for t in tl.static_range(T):
            y_q = tl.load(y + 2 * t * size + at, inside, 0.0)
            y_k = tl.load(y + 2 * t * size + at + C, inside, 0.0)
            h_q, h_k, h_a = _charges(y_q, y_k, inside, norm_q, norm_k, v_q, v_k, v_a, THRESHOLD, ACC)
            v_q = device.reset(h_q, THRESHOLD)
            v_k = device.reset(h_k, THRESHOLD)
            v_a = device.reset(h_a, ATTN)
            charges = charges + (h_q, h_k, h_a)
        grad_vq = tl.zeros((BR, BH, BD), ACC)
        grad_vk = tl.zeros((BR, BH, BD), ACC)
        grad_va = tl.zeros((BR, BH, 1), ACC)
        for first in tl.static_range((T - 1) // GROUP * GROUP, -1, -GROUP):
            grads = device.load_steps(grad_out, r * C + c, size, first, inside, T, GROUP)
            for t in tl.static_range(min(first + GROUP, T) - 1, first - 1, -1):
                h_q = charges[3 * t]
                h_k = charges[3 * t + 1]
                h_a = charges[3 * t + 2]
                g = grads[t - first].to(ACC)
                grad_mask = tl.sum(tl.where(h_k >= THRESHOLD, g, 0.0), 2, keep_dims=True)
                grad_va = device.current_gradient(grad_mask, h_a, ATTN, grad_va)
                grad_vk = device.current_gradient(tl.where(h_a >= ATTN, g, 0.0), h_k, THRESHOLD, grad_vk)
                grad_vq = device.current_gradient(grad_va, h_q, THRESHOLD, grad_vq)
                y_q = tl.load(y + 2 * t * size + at, inside, 0.0).to(ACC)
                y_k = tl.load(y + 2 * t * size + at + C, inside, 0.0).to(ACC)
                if partial is not None:
                    sum_q += grad_vq
                    sum_k += grad_vk
                    sum_qx += grad_vq * (y_q - norm_q[0])
                    sum_kx += grad_vk * (y_k - norm_k[0])
                else:
                    out = grad + 2 * t * size + at
                    tl.store(out, device.through_norm(grad_vq, y_q, norm_q, means_q), inside)
                    tl.store(out + C, device.through_norm(grad_vk, y_k, norm_k, means_k), inside)
    if partial is not None:
        out = partial + program * 4 * C + c
        tl.store(out, tl.sum(sum_q, 0, keep_dims=True), there)
        tl.store(out + C, tl.sum(sum_k, 0, keep_dims=True), there)
        tl.store(out + 2 * C, tl.sum(sum_qx, 0, keep_dims=True) * norm_q[1], there)
        tl.store(out + 3 * C, tl.sum(sum_kx, 0, keep_dims=True) * norm_k[1], there)


@functools.cache
def _tiling(rows: int, heads: int, width: int, elements: int, reduce: bool = False) -> Tiling:
    """Return tiles of rows, heads and channels of a head, with `elements` a thread."""
    BD = next_power_of_2(width)
    BH = min(next_power_of_2(heads), max(1, 64 // BD))
    warps = warps_for(rows * heads * BD, elements)
    BR = max(1, warps * 32 * elements // (BH * BD))
    tiles = tiles_for(rows, BR) if reduce else 1
    programs = cdiv(rows, BR * tiles)
    return Tiling((programs, cdiv(heads, BH)), warps, (BR, BH, BD), tiles, programs)


def forward(y: Tensor, norm: Tensor, heads: int) -> Tensor:
    """Return the keys that pass [T,R,C], as spikes."""
    steps, rows, channels = y.shape[0], y.shape[1], y.shape[2] // 2
    out = y.new_empty((steps, rows, channels))
    width = channels // heads
    constants = width, THRESHOLD, ATTN_THRESHOLD, steps, min(steps, 4)
    _tiling(rows, heads, width, 8).launch(_forward_kernel, y, norm, out, rows, channels, heads, *constants)
    return out


def backward(
    y: Tensor, norm: Tensor, grad_out: Tensor, heads: int, *, sums: bool, total: Tensor | None = None, count: int = 0
) -> Tensor:
    """Return with `sums` the gradients of beta and gamma [2,2C], else that of y; see `bn_lif.backward`."""
    steps, rows, channels = grad_out.shape
    width = channels // heads
    tiles = _tiling(rows, heads, width, per_thread(steps, 2), reduce=sums)
    partial = norm.new_empty((tiles.programs, 2, 2 * channels)) if sums else None
    grad = None if sums else torch.empty_like(y)
    constants = width, THRESHOLD, ATTN_THRESHOLD, steps, min(steps, 4), tiles.tiles
    tiles.launch(_backward_kernel, y, norm, grad_out, total, partial, grad, rows, channels, heads, count, *constants)
    return partial.sum(0) if sums else grad
