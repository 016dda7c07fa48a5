"""Products in bfloat16 on CPUs without units for it: taken in float32 and rounded once."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import empty_like
from .row_blocks import row_blocks

WEIGHT_ELEMENTS = 2**20
"""Elements of one block of a weight that is widened."""

MIN_ROWS = 8
"""From how many rows on a widened product is the faster one: a bfloat16 weight is half as much to read."""


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones; other than x86 is left to torch."""
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported() or not cpu._is_avx2_supported()


def supports(x: Tensor, other: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``x [..., n]`` would be multiplied in bfloat16, slowly."""
    if has_bfloat16_units() or x.numel() < max(1, MIN_ROWS * x.size(-1)):
        return False
    if bias is not None and bias.dtype != other.dtype and not torch.is_autocast_enabled("cpu"):
        return False
    return _product_dtype(x, other) == torch.bfloat16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., in]``, ``weight [out, in]``, ``bias [out] -> [..., out]``."""
    dtype = _product_dtype(x, weight)
    bias = None if bias is None else bias.to(dtype)
    y: Tensor = _WideLinear.apply(x.to(dtype), weight.to(dtype), bias)
    return y


def linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """That of ``linear``: ``grad [n, out]``, ``weight [out, in] -> [n, in]``."""
    total = grad.new_zeros(len(grad), weight.shape[1], dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        for block in row_blocks(weight, WEIGHT_ELEMENTS):
            total.addmm_(grad[:, block].float(), weight[block].float())
    return total.to(grad.dtype)


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """That of ``linear``: ``grad [n, out]``, ``x [n, in] -> [out, in]``."""
    rows, total = x.float(), empty_like(grad.new_empty(grad.shape[1], x.shape[1]))
    with torch.autocast("cpu", enabled=False):
        for block in row_blocks(total, WEIGHT_ELEMENTS):
            total[block] = grad[:, block].float().T @ rows
    return total


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        rows, y = x.reshape(-1, x.shape[-1]).float(), x.new_empty(*x.shape[:-1], weight.shape[0])
        with torch.autocast("cpu", enabled=False):
            for block in row_blocks(weight, WEIGHT_ELEMENTS):
                part = F.linear(rows, weight[block].float(), None if bias is None else bias[block].float())
                y.view(-1, weight.shape[0])[:, block] = part
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads, needed = grad.reshape(-1, weight.shape[0]), ctx.needs_input_grad
        x_grad = linear_input_grad(grads, weight).view(x.shape) if needed[0] else None
        weight_grad = linear_weight_grad(grads, x.reshape(-1, x.shape[-1])) if needed[1] else None
        return x_grad, weight_grad, grads.sum(0) if ctx.biased else None


def _product_dtype(x: Tensor, other: Tensor) -> torch.dtype:
    """In which the two are multiplied."""
    dtype = torch.promote_types(x.dtype, other.dtype)
    autocast = torch.is_autocast_enabled("cpu") and dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if autocast else dtype
