"""Max pooling (3x3, stride 2, padding 1) before BatchNorm, on rows of channels [N,H,W,C].

BatchNorm keeps the order of values, or reverses it if gamma is negative. Pooling first, directly after the
convolution, leaves a quarter of the values to later steps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import accumulator_of, load_means, load_norm, through_norm
from .launch import tiling


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    y, norm, out, index, rows, H, W, HO, WO, C, BR: tl.constexpr, BC: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = accumulator_of(y.dtype)
    r = tl.program_id(ROWS) * BR + tl.arange(0, BR)[:, None]  # divisions of 64 bits would cost more than the memory
    c = tl.program_id(1 - ROWS) * BC + tl.arange(0, BC)[None, :]
    inside = (r < rows) & (c < C)
    n, ho, wo = (r // (HO * WO)).to(tl.int64), r // WO % HO, r % WO
    gamma = tl.load(norm + 2 * C + c, c < C, 0.0).to(ACC)
    sign = tl.where(gamma > 0, 1.0, tl.where(gamma < 0, -1.0, 0.0)).to(ACC)
    best = tl.full((BR, BC), float("-inf"), ACC)
    value = tl.zeros((BR, BC), ACC)
    which = tl.full((BR, BC), 4, tl.int32)  # the centre is always inside
    for k in tl.static_range(9):
        h = ho * 2 - 1 + k // 3
        w = wo * 2 - 1 + k % 3
        there = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x = tl.load(y + ((n * H + h) * W + w) * C + c, there, 0.0).to(ACC)
        signed = x * sign
        better = there & ((signed > best) | (signed != signed))  # NaN is the largest, as in torch
        best = tl.where(better, signed, best)
        value = tl.where(better, x, value)
        which = tl.where(better, k, which)
    tl.store(out + r.to(tl.int64) * C + c, value, inside)
    if index is not None:
        tl.store(index + r.to(tl.int64) * C + c, which.to(tl.int8), inside)


@triton.jit(do_not_specialize=["rows", "M"])
def _backward_kernel(
    y, norm, index, grad_u, total, grad, rows, H, W, HO, WO, C, M, BR: tl.constexpr, BC: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of y. A row is a window [i,j], and the block [2i:2i+2,2j:2j+2] of y, in up to four windows."""
    ACC: tl.constexpr = accumulator_of(y.dtype)
    r = tl.program_id(ROWS) * BR + tl.arange(0, BR)[:, None]  # divisions of 64 bits would cost more than the memory
    c = tl.program_id(1 - ROWS) * BC + tl.arange(0, BC)[None, :]
    inside = (r < rows) & (c < C)
    n, i, j = (r // (HO * WO)).to(tl.int64), r // WO % HO, r % WO
    bn = load_norm(norm, c, C, ACC)
    means = load_means(total, c, C, M, ACC)
    places = ()
    grads = ()
    for window in tl.static_range(4):
        ho, wo = i + window // 2, j + window % 2
        at = ((n * HO + ho) * WO + wo) * C + c
        there = inside & (ho < HO) & (wo < WO)
        places = places + (tl.load(index + at, there, -1),)
        grads = grads + (tl.load(grad_u + at, there, 0.0).to(ACC),)
    ys = ()
    for k in tl.static_range(4):
        h, w = i * 2 + k // 2, j * 2 + k % 2
        ys = ys + (tl.load(y + ((n * H + h) * W + w) * C + c, inside & (h < H) & (w < W), 0.0),)
    for k in tl.static_range(4):
        h, w = i * 2 + k // 2, j * 2 + k % 2
        g = tl.zeros((BR, BC), ACC)
        for window in tl.static_range(4):
            if window // 2 <= k // 2 and window % 2 <= k % 2:  # even rows and columns lie in one window only
                place = (k // 2 - window // 2 * 2 + 1) * 3 + k % 2 - window % 2 * 2 + 1
                g += tl.where(places[window] == place, grads[window], 0.0)
        g = through_norm(g, ys[k].to(ACC), bn, means)
        tl.store(grad + ((n * H + h) * W + w) * C + c, g, inside & (h < H) & (w < W))


def forward(y: Tensor, norm: Tensor, index: bool) -> tuple[Tensor, Tensor | None]:
    """Return each window's value of y [N,H,W,C] that BatchNorm makes the largest, and its index of 9: [N,H',W',C]."""
    n, h, w, channels = y.shape
    out = y.new_empty((n, (h + 1) // 2, (w + 1) // 2, channels))
    which = torch.empty_like(out, dtype=torch.int8) if index else None
    rows = out.numel() // channels
    tiles = tiling(rows, channels, 8)
    tiles.launch(_forward_kernel, y, norm, out, which, rows, h, w, *out.shape[1:3], channels)
    return out, which


def backward(y: Tensor, norm: Tensor, index: Tensor, grad_u: Tensor, total: Tensor | None, count: int) -> Tensor:
    """Return the gradient of y from that of the pooled current, `grad_u` [N,H',W',C]; see `bn_lif.backward`."""
    h, w, channels = y.shape[1:]
    grad = torch.empty_like(y)
    rows = index.numel() // channels
    tiles = tiling(rows, channels, 8)
    sizes = rows, h, w, *index.shape[1:3], channels, count
    tiles.launch(_backward_kernel, y, norm, index, grad_u, total, grad, *sizes)
    return grad
