"""Device functions of several kernels: the neuron's equations, loads over time, BatchNorm."""

import triton
import triton.language as tl

from ...neuron import ALPHA, TAU

assert (TAU, ALPHA) == (2.0, 4.0), "the kernels have these numbers written out"
PTX = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter has no inline assembly


@triton.constexpr_function
def accumulator_of(pointer):
    """Return the dtype to compute in, from that of a pointer."""
    return tl.float64 if pointer.element_ty == tl.float64 else tl.float32


@triton.jit
def charge(u, v):
    """Return the membrane before the spike, from current and membrane; tau is 2."""
    return v + (u - v) * 0.5


@triton.jit
def reset(h, THRESHOLD: tl.constexpr):
    """Return the membrane after the spike, from the charged one."""
    return tl.where(h >= THRESHOLD, 0.0, h)


@triton.jit
def spike_probability(h, THRESHOLD: tl.constexpr):
    """Return sigmoid(4 (h - THRESHOLD)), whose derivative is the surrogate gradient."""
    if PTX and h.dtype == tl.float32:  # exp and division spend two thirds of their instructions on denormals
        x = h * -5.770780163555854 + THRESHOLD * 5.770780163555854  # 4 / log(2)
        e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        s = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1 + e], tl.float32, is_pure=True, pack=1)
    else:
        s = tl.sigmoid((h - THRESHOLD) * 4.0)
    return s


@triton.jit
def current_gradient(grad_spike, h, THRESHOLD: tl.constexpr, grad_v):
    """Return the gradient of the current, which is also that of the membrane before the charge; tau is 2.

    `h` is the charged membrane. `grad_v` is the gradient of the membrane after the reset; it passes without a spike.
    """
    s = spike_probability(h, THRESHOLD)
    return grad_spike * (s - s * s) * 2 + tl.where(h < THRESHOLD, 0.5 * grad_v, 0.0)


@triton.jit
def until(T: tl.constexpr, t, inside, STEPS: tl.constexpr):
    """Return the mask `inside` at step t; False from step T on, where groups of STEPS may end."""
    if T % STEPS != 0:
        inside = inside & (t < T)
    return inside


@triton.jit
def load_steps(x, at, size, first, inside, T: tl.constexpr, STEPS: tl.constexpr):
    """Return a tuple of the tiles of STEPS time steps from `first` on; zeros from step T on.

    The compiler keeps loads after earlier stores. Loading several steps before the first store overlaps their latency.
    """
    tiles = ()
    base = x + first * size
    for step in tl.static_range(STEPS):
        tiles = tiles + (tl.load(base + at, until(T, first + step, inside, STEPS), 0.0),)
        base += size
    return tiles


@triton.jit
def load_norm(norm, c, C, ACC: tl.constexpr):
    """Return mean, 1 / standard deviation, gamma and beta of channels c from `norm` [4,C]."""
    inside = c < C
    mean = tl.load(norm + c, inside, 0.0).to(ACC)
    rstd = tl.load(norm + C + c, inside, 0.0).to(ACC)
    gamma = tl.load(norm + 2 * C + c, inside, 0.0).to(ACC)
    return mean, rstd, gamma, tl.load(norm + 3 * C + c, inside, 0.0).to(ACC)


@triton.jit
def normalised(y, norm):
    """Apply BatchNorm to y, with the result of `load_norm`."""
    return (y - norm[0]) * (norm[1] * norm[2]) + norm[3]


@triton.jit
def load_means(total, c, C, M, ACC: tl.constexpr):
    """Return means over M rows of the gradients of beta and gamma, `total` [2,C]; an empty tuple if that is None."""
    means = ()
    if total is not None:
        share = 1.0 / M.to(ACC)
        of_beta = tl.load(total + c, c < C, 0.0).to(ACC) * share
        means = (of_beta, tl.load(total + C + c, c < C, 0.0).to(ACC) * share)
    return means


@triton.jit
def through_norm(g, y, norm, means):
    """Return the gradient of y from that of BatchNorm's output, with the results of `load_norm` and `load_means`."""
    scale = norm[1] * norm[2]
    g = g * scale
    if len(means) > 0:
        g -= (y - norm[0]) * (norm[1] * means[1] * scale) + means[0] * scale
    return g


@triton.jit
def add_pairs(a, b, c, d):
    """Add pairs, to reduce two sums at once."""
    return a + c, b + d
