"""Packed spikes for the backward pass: a bit per spike, and a byte per sum of spikes, not two or four bytes."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .launch import cdiv

BLOCK = 1024  # bytes that a program writes or reads


@triton.jit
def _pack_kernel(x, bits, SIZE, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    place = tl.arange(0, 8)[None, :]
    fired = tl.load(x + byte * 8 + place, byte * 8 + place < SIZE, 0.0) != 0
    out = byte + tl.zeros((1, 1), tl.int64)
    tl.store(bits + out, tl.sum(fired.to(tl.int32) << place, 1, keep_dims=True).to(tl.uint8), byte * 8 < SIZE)


@triton.jit
def _unpack_kernel(bits, x, SIZE, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    place = tl.arange(0, 8)[None, :]
    fired = tl.load(bits + byte, byte * 8 < SIZE, 0).to(tl.int32) >> place & 1
    tl.store(x + byte * 8 + place, fired.to(x.dtype.element_ty), byte * 8 + place < SIZE)


def pack(x: Tensor) -> Tensor:
    """Pack dense spikes into bytes [ceil(numel / 8)], in memory order."""
    bits = torch.empty(cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    _pack_kernel[(cdiv(len(bits), BLOCK),)](x, bits, x.numel(), BLOCK)
    return bits


def unpack(bits: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return the first `size` spikes of `bits`."""
    x = torch.empty(size, dtype=dtype, device=bits.device)
    _unpack_kernel[(cdiv(len(bits), BLOCK),)](bits, x, size, BLOCK)
    return x


def packed(spikes: Tensor, binary: bool) -> saved_tensors_hooks:
    """Return a context in which autograd keeps the dense tensor `spikes` as bits if `binary`, else as bytes."""
    start, size, dtype = spikes.data_ptr(), spikes.numel(), spikes.dtype

    def save(x: Tensor) -> Tensor | tuple[Tensor, tuple, tuple]:
        if x.data_ptr() != start:  # for example a weight
            return x
        flat = x.as_strided((size,), (1,))
        return pack(flat) if binary else flat.to(torch.uint8), x.shape, x.stride()

    def load(kept: Tensor | tuple[Tensor, tuple, tuple]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        small, shape, stride = kept
        flat = unpack(small, size, dtype) if binary else small.to(dtype)
        return flat.as_strided(shape, stride)

    return saved_tensors_hooks(save, load)
