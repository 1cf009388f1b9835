"""Fused path: BatchNorm, pooling, neurons, residual additions and attention in few steps.

The modules of `models` stay the reference and own the state dict. `plan` walks through them. `gpu` computes their units
with Triton kernels (lif_backend "triton", or "auto" on CUDA), `cpu` with folded BatchNorm ("auto" on a CPU, in
evaluation). `kernels` has the kernels, and `autograd` the autograd functions that call them.
"""
