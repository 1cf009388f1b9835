"""Spiking self-attention after the neurons of query, key and value: q (k^T v) and its neurons.

Shapes: s [T,B,N,3C] holds query, key and value side by side, each of h heads of D channels; kv = k^T v is [T*B,h,D,D]
and the result [T,B,N,C]. T is at most `CHUNK`.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...neuron import ATTN_THRESHOLD
from .device import accumulator_of, charge, current_gradient, reset
from .launch import cdiv, next_power_of_2


@triton.jit
def _load(x, row, N, stride, d, D: tl.constexpr):
    """Load a tile [BN,BD] of a head's tokens; `x` points to the head's first channel of the first token."""
    return tl.load(x + row[:, None] * stride + d[None, :], (row[:, None] < N) & (d[None, :] < D), 0.0)


@triton.jit
def _store(x, value, row, N, stride, d, D: tl.constexpr):
    tl.store(x + row[:, None] * stride + d[None, :], value, (row[:, None] < N) & (d[None, :] < D))


@triton.jit
def _dot(a, b, ACC: tl.constexpr):
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _charge(s, kv, frame, head, row, d, v, C, SCALE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr):
    """Return the charged membrane that gets q (k^T v) of a head, from membrane v."""
    q = _load(s + frame * N * 3 * C + head * D, row, N, 3 * C, d, D)
    read = _load(kv + (frame * tl.num_programs(1) + head) * D * D, d, D, D, d, D)
    return charge(_dot(q, read.to(q.dtype), ACC) * SCALE, v)


@triton.jit
def _kv_kernel(s, kv, C, N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    ACC: tl.constexpr = accumulator_of(s.dtype)
    frame = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BD)
    k = s + frame * N * 3 * C + C + head * D
    total = tl.zeros((BD, BD), ACC)
    for first in range(0, N, BN):
        row = first + tl.arange(0, BN)
        total += _dot(tl.trans(_load(k, row, N, 3 * C, d, D)), _load(k + C, row, N, 3 * C, d, D), ACC)
    out = kv + (frame * tl.num_programs(1) + head) * D * D
    _store(out, total, d, D, D, d, D)


@triton.jit
def _forward_kernel(
    s, kv, out, B, C, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, T: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = accumulator_of(s.dtype)
    row = tl.program_id(2) * BN + tl.arange(0, BN)
    head = tl.program_id(1)
    d = tl.arange(0, BD)
    v = tl.zeros((BN, BD), ACC)
    for t in tl.static_range(T):
        frame = t * B + tl.program_id(0).to(tl.int64)
        h = _charge(s, kv, frame, head, row, d, v, C, SCALE, N, D, ACC)
        v = reset(h, THRESHOLD)
        spikes = tl.where(h >= THRESHOLD, 1.0, 0.0)
        _store(out + frame * N * C + head * D, spikes, row, N, C, d, D)


@triton.jit
def _product_gradient_kernel(
    s, kv, grad_out, grad_product, B, C, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, T: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the gradient [T,B,N,C] of the product q (k^T v)."""
    ACC: tl.constexpr = accumulator_of(s.dtype)
    row = tl.program_id(2) * BN + tl.arange(0, BN)
    head = tl.program_id(1)
    d = tl.arange(0, BD)
    v = tl.zeros((BN, BD), ACC)
    charges = ()
    for t in tl.static_range(T):
        frame = t * B + tl.program_id(0).to(tl.int64)
        h = _charge(s, kv, frame, head, row, d, v, C, SCALE, N, D, ACC)
        v = reset(h, THRESHOLD)
        charges = charges + (h,)
    grad_v = tl.zeros((BN, BD), ACC)
    for back in tl.static_range(T):
        frame = (T - 1 - back) * B + tl.program_id(0).to(tl.int64)
        g = _load(grad_out + frame * N * C + head * D, row, N, C, d, D)
        grad_v = current_gradient(g.to(ACC), charges[T - 1 - back], THRESHOLD, grad_v)
        _store(grad_product + frame * N * C + head * D, grad_v * SCALE, row, N, C, d, D)


@triton.jit
def _input_gradient_kernel(
    s, kv, grad_product, grad, C, N: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write the gradients of query, key and value from that of the product q (k^T v)."""
    ACC: tl.constexpr = accumulator_of(s.dtype)
    frame = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BD)
    q = s + frame * N * 3 * C + head * D
    g = grad_product + frame * N * C + head * D
    out = grad + frame * N * 3 * C + head * D
    read = tl.trans(_load(kv + (frame * tl.num_programs(1) + head) * D * D, d, D, D, d, D))
    grad_kv = tl.zeros((BD, BD), ACC)
    for first in range(0, N, BN):
        row = first + tl.arange(0, BN)
        of_product = _load(g, row, N, C, d, D)
        grad_kv += _dot(tl.trans(_load(q, row, N, 3 * C, d, D)), of_product, ACC)
        _store(out, _dot(of_product, read.to(of_product.dtype), ACC), row, N, 3 * C, d, D)
    for first in range(0, N, BN):
        row = first + tl.arange(0, BN)
        k = _load(q + C, row, N, 3 * C, d, D)
        v = _load(q + 2 * C, row, N, 3 * C, d, D)
        _store(out + C, _dot(v, tl.trans(grad_kv).to(v.dtype), ACC), row, N, 3 * C, d, D)
        _store(out + 2 * C, _dot(k, grad_kv.to(k.dtype), ACC), row, N, 3 * C, d, D)


@functools.cache
def _blocks(steps: int, tokens: int, width: int, element_size: int) -> dict[str, int]:
    """Return tokens and channels of a program's tile; the membranes of all steps must fit into registers."""
    BD = max(16, next_power_of_2(width))
    BN = max(16, min(64, 2**15 // (element_size * BD * next_power_of_2(steps))))
    return {"N": tokens, "D": width, "BN": BN, "BD": BD}


def forward(s: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return spikes [T,B,N,C], and kv for `backward`."""
    steps, batch, tokens, channels = *s.shape[:3], s.shape[3] // 3
    blocks = _blocks(steps, tokens, channels // heads, s.element_size())
    kv = s.new_empty((steps * batch, heads, blocks["D"], blocks["D"]))
    out = s.new_empty((steps, batch, tokens, channels))
    _kv_kernel[steps * batch, heads](s, kv, channels, **blocks)
    _forward_kernel[batch, heads, cdiv(tokens, blocks["BN"])](
        s, kv, out, batch, channels, scale, ATTN_THRESHOLD, steps, **blocks
    )
    return out, kv


def backward(s: Tensor, kv: Tensor, grad_out: Tensor, scale: float) -> Tensor:
    """Return the gradient of s."""
    steps, batch, tokens, channels = grad_out.shape
    heads = kv.shape[1]
    blocks = _blocks(steps, tokens, channels // heads, s.element_size())
    grad, grad_product = torch.empty_like(s), torch.empty_like(grad_out)
    smaller = blocks | {"BN": min(blocks["BN"], max(16, 2**11 // blocks["BD"]))}  # gradients need registers, too
    _product_gradient_kernel[batch, heads, cdiv(tokens, smaller["BN"])](
        s, kv, grad_out, grad_product, batch, channels, scale, ATTN_THRESHOLD, steps, **smaller
    )
    _input_gradient_kernel[steps * batch, heads](s, kv, grad_product, grad, channels, **blocks)
    return grad
