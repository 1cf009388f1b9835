"""BatchNorm, LIF neurons and the residual addition in one kernel, forward and backward.

Shapes: [T,R,C], with R = B*H*W positions as rows of channels, or [1,R,C] if all T steps are equal. `norm` [4,C] holds
mean, 1 / standard deviation, gamma and beta.

The backward pass needs only the input, because it recomputes the membrane. One launch computes BatchNorm's sums over
the rows, another writes the gradient: this moves less memory than writing a gradient and reading it again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device
from .launch import CHUNK, accumulator, cdiv, per_thread, tiling


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    y, norm, add, out, starts, R, C, THRESHOLD: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr,
    STATIC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write spikes step by step; the loads of GROUP steps come before their stores."""
    ACC: tl.constexpr = device.accumulator_of(y.dtype)
    GROUP: tl.constexpr = CHUNK if T > CHUNK else min(T, 4)
    r = tl.program_id(ROWS).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    c = tl.program_id(1 - ROWS) * BC + tl.arange(0, BC)[None, :]
    inside = (r < R) & (c < C)
    at = r * C + c
    size = R.to(tl.int64) * C  # of a step
    if norm is not None:
        bn = device.load_norm(norm, c, C, ACC)
    if STATIC:
        ys = device.load_steps(y, at, 0, 0, inside, 1, 1)
    v = tl.zeros((BR, BC), ACC)
    for first in range(0, T, CHUNK):
        if starts is not None:
            tl.store(starts + first // CHUNK * size + at, v, inside)
        for group in tl.static_range(0, CHUNK, GROUP):
            if not STATIC:
                ys = device.load_steps(y, at, size, first + group, inside, T, GROUP)
            if add is not None:
                adds = device.load_steps(add, at, size, first + group, inside, T, GROUP)
            for step in tl.static_range(GROUP):
                t = first + group + step
                u = ys[0 if STATIC else step].to(ACC)
                if norm is not None:
                    u = device.normalised(u, bn)
                h = device.charge(u, v)
                v = device.reset(h, THRESHOLD)
                s = tl.where(h >= THRESHOLD, 1.0, 0.0)
                if add is not None:
                    s += adds[step].to(ACC)
                tl.store(out + t * size + at, s, device.until(T, t, inside, GROUP))


@triton.jit(do_not_specialize=["R", "M"])
def _backward_kernel(
    y, norm, grad_out, starts, total, partial, grad, R, C, M, THRESHOLD: tl.constexpr, T: tl.constexpr,
    CHUNK: tl.constexpr, STATIC: tl.constexpr, GRAD_Y: tl.constexpr, TILES: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write sums over the rows to `partial` [programs,2,C], and the gradient of the current u or input y to `grad`.

    With `total` [2,C], the sums over M rows, the gradient of y includes that through the statistics. The loads of a
    chunk come before its stores.
    """
    ACC: tl.constexpr = device.accumulator_of(y.dtype)
    program = tl.program_id(ROWS).to(tl.int64)
    c = tl.program_id(1 - ROWS) * BC + tl.arange(0, BC)[None, :]
    size = R.to(tl.int64) * C
    sum_g = tl.zeros((BR, BC), ACC)
    sum_gx = tl.zeros((BR, BC), ACC)
    if norm is not None:
        bn = device.load_norm(norm, c, C, ACC)
    means = device.load_means(total, c, C, M, ACC)
    for tile in range(TILES):
        r = (program * TILES + tile) * BR + tl.arange(0, BR)[:, None]
        inside = (r < R) & (c < C)
        at = r * C + c
        if STATIC:
            ys = device.load_steps(y, at, 0, 0, inside, 1, 1)
        grad_v = tl.zeros((BR, BC), ACC)
        grad_static = tl.zeros((BR, BC), ACC)
        for back in range(0, T, CHUNK):
            first = (T - 1) // CHUNK * CHUNK - back
            v = tl.zeros((BR, BC), ACC)
            if T > CHUNK:
                v = tl.load(starts + first // CHUNK * size + at, inside, 0.0).to(ACC)
            if not STATIC:
                ys = device.load_steps(y, at, size, first, inside, T, CHUNK)
            grads = device.load_steps(grad_out, at, size, first, inside, T, CHUNK)
            charges = ()
            for step in tl.static_range(CHUNK):
                u = ys[0 if STATIC else step].to(ACC)
                if norm is not None:
                    u = device.normalised(u, bn)
                h = device.charge(u, v)
                v = device.reset(h, THRESHOLD)
                charges = charges + (h,)
            for step in tl.static_range(CHUNK - 1, -1, -1):
                grad_v = device.current_gradient(grads[step].to(ACC), charges[step], THRESHOLD, grad_v)
                y_step = ys[0 if STATIC else step].to(ACC)
                if partial is not None:
                    sum_g += grad_v
                    sum_gx += grad_v * (y_step - bn[0])
                if STATIC:
                    grad_static += grad_v
                elif grad is not None:
                    g = device.through_norm(grad_v, y_step, bn, means) if GRAD_Y else grad_v
                    tl.store(grad + (first + step) * size + at, g, device.until(T, first + step, inside, CHUNK))
        if STATIC and grad is not None:
            g = device.through_norm(grad_static, ys[0].to(ACC), bn, means) if GRAD_Y else grad_static
            tl.store(grad + at, g, inside)
    if partial is not None:
        out = partial + program * 2 * C + c
        sum_g, sum_gx = tl.reduce((sum_g, sum_gx), 0, device.add_pairs, keep_dims=True)
        tl.store(out, sum_g, c < C)
        tl.store(out + C, sum_gx * bn[1], c < C)


def forward(
    y: Tensor, norm: Tensor | None, add: Tensor | None, steps: int, threshold: float, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Return spikes [T,R,C], plus `add` if given; with `keep` also membranes, which `backward` needs if T > `CHUNK`."""
    shown, rows, channels = y.shape
    out = y.new_empty((steps, rows, channels))
    keep = keep and steps > CHUNK
    starts = y.new_empty((cdiv(steps, CHUNK), rows, channels), dtype=accumulator(y)) if keep else None
    tiles = tiling(rows, channels, 16 if steps <= CHUNK else 4)
    constants = threshold, steps, min(steps, CHUNK), shown < steps
    tiles.launch(_forward_kernel, y, norm, add, out, starts, rows, channels, *constants)
    return out, starts


def backward(
    y: Tensor, norm: Tensor | None, grad_out: Tensor, starts: Tensor | None, threshold: float, *,
    sums: bool = False, of: str | None = None, total: Tensor | None = None, count: int = 0,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return with `sums` the gradients of beta and gamma [2,C], and the gradient `of` "u" (the current) or "y".

    `total` has the gradients of beta and gamma over `count` rows, if the statistics depend on y.
    """
    steps, rows, channels = grad_out.shape
    chunk = min(steps, CHUNK)
    tiles = tiling(rows, channels, per_thread(chunk, 2 if sums else 1), reduce=sums)
    partial = norm.new_empty((tiles.programs, 2, channels)) if sums else None
    grad = torch.empty_like(y) if of else None
    constants = threshold, steps, chunk, y.shape[0] < steps, of == "y", tiles.tiles
    tiles.launch(_backward_kernel, y, norm, grad_out, starts, total, partial, grad, rows, channels, count, *constants)
    return partial.sum(0) if sums else None, grad
