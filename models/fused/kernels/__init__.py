"""Triton kernels, each with the functions that launch it; `device` and `launch` are shared."""
