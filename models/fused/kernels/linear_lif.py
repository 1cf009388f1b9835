"""1x1 convolution, BatchNorm, LIF neurons and residual addition in one kernel, for evaluation in half precision."""

import triton
import triton.language as tl
from torch import Tensor

from .device import accumulator_of, charge, load_norm, normalised, reset
from .launch import cdiv

ROWS = 128  # of a program; one warp for every 16


@triton.jit(do_not_specialize=["R"])
def _kernel(
    x, weight, norm, add, out, R, C, THRESHOLD: tl.constexpr, T: tl.constexpr, K: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = accumulator_of(x.dtype)
    columns = tl.cdiv(C, BC)
    c = tl.program_id(0) % columns * BC + tl.arange(0, BC)[None, :]  # neighbouring programs share rows of x
    r = (tl.program_id(0) // columns).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    k = tl.arange(0, BK)
    inside = (r < R) & (c < C)
    size = R.to(tl.int64) * C
    v = tl.zeros((BR, BC), ACC)
    for t in range(T):
        y = tl.zeros((BR, BC), ACC)
        for first in range(0, K, BK):
            inputs = first + k
            row = tl.load(x + (t * R.to(tl.int64) + r) * K + inputs[None, :], (r < R) & (inputs[None, :] < K), 0.0)
            column = tl.load(weight + c * K + inputs[:, None], (c < C) & (inputs[:, None] < K), 0.0)
            y = tl.dot(row, column, y, input_precision="ieee", out_dtype=ACC)
        h = charge(normalised(y, load_norm(norm, c, C, ACC)), v)  # loaded in each step, to save registers
        v = reset(h, THRESHOLD)
        s = tl.where(h >= THRESHOLD, 1.0, 0.0)
        if add is not None:
            s += tl.load(add + t * size + r * C + c, inside, 0.0).to(ACC)
        tl.store(out + t * size + r * C + c, s, inside)


def forward(x: Tensor, weight: Tensor, norm: Tensor, add: Tensor | None, threshold: float) -> Tensor:
    """Return spikes [T,R,C] for x [T,R,K] and weight [C,K] of its dtype; `norm` [4,C] has the running statistics."""
    steps, rows, width = x.shape
    channels = len(weight)
    out = x.new_empty((steps, rows, channels))
    BR, BC, BK = ROWS, 64, 64 if width % 64 == 0 else 32  # larger tiles spill registers
    _kernel[(cdiv(channels, BC) * cdiv(rows, BR),)](
        x, weight, norm, add, out, rows, channels, threshold, steps, width,
        BR=BR, BC=BC, BK=BK, num_warps=ROWS // 16, num_stages=3,
    )  # fmt: skip
    return out
