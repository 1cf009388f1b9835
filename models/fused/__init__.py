"""The fused path (lif_backend "triton"): our own Triton kernels in place of BatchNorm, pooling, neurons, attention.

The modules of `models` stay the reference, in code and in numbers; state dicts are theirs. `network` reads as they do,
`functions` are its differentiable steps, and the other files hold a kernel each.
"""

import triton

from . import functions, network

__all__ = ["functions", "interpreted", "network"]


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device and slowly (TRITON_INTERPRET=1)."""
    return triton.knobs.runtime.interpret
