"""Autograd functions of the kernels. Shapes are [T,B,H,W,C], or [1,B,H,W,C] if all T steps are equal."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..neuron import THRESHOLD
from .kernels import bn_lif, bn_stats, pool, self_attention, token_attention
from .kernels.bn_stats import Norm


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on any device and slowly (TRITON_INTERPRET=1)."""
    return triton.knobs.runtime.interpret


_NO_GRADIENT = SimpleNamespace(needs_input_grad=())  # context of a forward pass without gradients


class Unit(NamedTuple):
    """BatchNorm, pooling and neurons after a convolution."""

    norms: tuple[Norm, ...]  # of the channels, one after the other
    steps: int  # T
    pool: bool = False
    leak: bool = False  # the membrane leaks across the batch, see `LIF`

    def parameters(self) -> list[Tensor | None]:
        """Return gamma, beta and the convolution's bias of each norm."""
        return [p for bn, bias in self.norms for p in (bn.weight, bn.bias, bias)]

    def gradients(self, total: Tensor, norm: Tensor, in_training: bool) -> list[Tensor | None]:
        """Return the gradients of `parameters`; `total` [2,C] holds those of all betas and gammas."""
        gradients, start = [], 0
        for bn, bias in self.norms:
            columns = slice(start, start + bn.num_features)
            beta, gamma = total[:, columns]
            of_bias = None  # zero in training, because BatchNorm subtracts the mean
            if bias is not None:
                of_bias = torch.zeros_like(bias) if in_training else (beta * norm[1, columns] * norm[2, columns])
            gradients += [gamma.to(bn.weight.dtype), beta.to(bn.bias.dtype), of_bias]
            start += bn.num_features
        return gradients

    def over_ranks(self, total: Tensor, count: int | Tensor | None) -> tuple[Tensor | None, int]:
        """Return the sum of `total` over ranks that share statistics, and the divisor that makes it a mean."""
        if not isinstance(count, Tensor):
            return (None, 0) if count is None else (total, count)
        total = total.clone()
        torch.distributed.all_reduce(total, group=self.norms[0].bn.process_group)
        return total / count, 1


class _Function(torch.autograd.Function):
    @classmethod
    def call(cls, *arguments) -> Tensor:
        """Apply the function; without gradients run only its forward pass, which is faster and keeps less."""
        return cls.apply(*arguments) if torch.is_grad_enabled() else cls.forward(_NO_GRADIENT, *arguments)


class _NormLIF(_Function):
    @staticmethod
    def forward(ctx, y: Tensor, add: Tensor | None, unit: Unit, *parameters: Tensor | None) -> Tensor:
        keep = any(ctx.needs_input_grad)
        y = y.contiguous()
        norm, count = bn_stats.norm_of(y, unit.norms, unit.steps // len(y))
        z, index = y, None
        if unit.pool:
            z, index = pool.forward(y.flatten(0, 1), norm, keep)
            z = z.unflatten(0, y.shape[:2])
        shape = (unit.steps, *z.shape[1:])
        rows, steps = (z.flatten(0, 1).flatten(1, 2), shape[0] * shape[1]) if unit.leak else (z.flatten(1, 3), shape[0])
        sew = None if add is None else add.contiguous().view(steps, *rows.shape[1:])
        out, starts = bn_lif.forward(rows, norm, sew, steps, THRESHOLD, keep)
        if keep:
            ctx.save_for_backward(y, rows, index, norm, starts)
            ctx.unit, ctx.count = unit, count
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        y, rows, index, norm, starts = ctx.saved_tensors
        unit = ctx.unit
        grad = grad.contiguous()  # once, because all earlier blocks of the stage receive it
        grad_out = grad.view(-1, *rows.shape[1:])
        total, grad_u = bn_lif.backward(
            rows, norm, grad_out, starts, THRESHOLD, sums=True, of="u" if unit.pool else None
        )
        shared, count = unit.over_ranks(total, ctx.count)
        if unit.pool:
            grad_y = pool.backward(y.flatten(0, 1), norm, index, grad_u.view(index.shape), shared, count).view_as(y)
        else:
            _, grad_y = bn_lif.backward(rows, norm, grad_out, starts, THRESHOLD, of="y", total=shared, count=count)
            grad_y = grad_y.view_as(y)
        grad_add = grad if ctx.needs_input_grad[1] else None
        return grad_y, grad_add, None, *unit.gradients(total, norm, shared is not None)


class _TokenAttention(_Function):
    @staticmethod
    def forward(ctx, y: Tensor, unit: Unit, heads: int, *parameters: Tensor | None) -> Tensor:
        y = y.contiguous()
        norm, count = bn_stats.norm_of(y, unit.norms, 1)
        out = token_attention.forward(y.flatten(1, 3), norm, heads)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(y, norm)
            ctx.unit, ctx.heads, ctx.count = unit, heads, count
        return out.view(*y.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        y, norm = ctx.saved_tensors
        rows, grad_out = y.flatten(1, 3), grad.contiguous().flatten(1, 3)
        total = token_attention.backward(rows, norm, grad_out, ctx.heads, sums=True)
        shared, count = ctx.unit.over_ranks(total, ctx.count)
        grad_y = token_attention.backward(rows, norm, grad_out, ctx.heads, sums=False, total=shared, count=count)
        return grad_y.view_as(y), None, None, *ctx.unit.gradients(total, norm, shared is not None)


class _SelfAttention(_Function):
    @staticmethod
    def forward(ctx, s: Tensor, heads: int, scale: float) -> Tensor:
        out, kv = self_attention.forward(s.flatten(2, 3), heads, scale)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(s, kv)
            ctx.scale = scale
        return out.view(*s.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        s, kv = ctx.saved_tensors
        grad_s = self_attention.backward(s.flatten(2, 3), kv, grad.contiguous().flatten(2, 3), ctx.scale)
        return grad_s.view_as(s), None, None


class _LIF(_Function):
    @staticmethod
    def forward(ctx, x: Tensor, threshold: float) -> Tensor:
        x = x.contiguous()
        size = x[0].numel()
        rows = x.view(len(x), -1, min(128, size & -size))  # the largest power of two that divides the size
        out, starts = bn_lif.forward(rows, None, None, len(x), threshold, any(ctx.needs_input_grad))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(rows, starts)
            ctx.threshold = threshold
        return out.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        rows, starts = ctx.saved_tensors
        _, grad_x = bn_lif.backward(rows, None, grad.contiguous().view_as(rows), starts, ctx.threshold, of="u")
        return grad_x.view_as(grad), None


def norm_lif_of(y: Tensor, unit: Unit, add: Tensor | None = None) -> Tensor:
    """Apply BatchNorm, max pooling if the unit has it, and LIF neurons; add `add` [T,B,H',W',C] to the spikes."""
    return _NormLIF.call(y, add, unit, *unit.parameters())


def token_attention_of(y: Tensor, unit: Unit, heads: int) -> Tensor:
    """Map query and key before BatchNorm, [T,B,H,W,2C], to the masked keys [T,B,H,W,C]."""
    return _TokenAttention.call(y, unit, heads, *unit.parameters())


self_attention_of = _SelfAttention.call  # spikes of query, key and value [T,B,H,W,3C] to spikes [T,B,H,W,C]
lif = _LIF.call  # currents [T, ...] to spikes
