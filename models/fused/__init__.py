"""The fused path: BatchNorm, pooling, neurons, residual additions and attention in few steps.

The modules of `models` stay the reference, in code and in numbers, and state dicts are theirs. `plan` reads as they
do; `gpu` computes it with Triton's kernels (lif_backend "triton", and "auto" on CUDA), `cpu` with folded BatchNorm
("auto" on a CPU, in evaluation). `autograd` makes autograd functions of the kernels, each in a file of `kernels`.
"""
