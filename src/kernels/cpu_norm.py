"""RMS norms of groups of channels on CPUs: forward with the bits of the body in ``functional``, gradient by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import empty_like
from .row_blocks import learns, row_blocks

MIN_ELEMENTS = 2**17
"""From how many elements on blocks gain more than they cost, with gradients."""

MIN_ELEMENTS_FORWARD = 2**20
"""The same without gradients."""

MAX_WIDTH = 2**15
"""From this width on torch lets several threads share the sum over a single row, which changes its bits."""


def supports(x: Tensor, weight: Tensor, group_size: int) -> bool:
    """Whether blocks are faster, with the same bits."""
    elements = x.numel()
    if elements < MIN_ELEMENTS or (elements < MIN_ELEMENTS_FORWARD and not learns(x, weight)):
        return False
    return x.is_contiguous() and x.size(-1) < MAX_WIDTH and _wide(weight.dtype) == _wide(x.dtype)


def group_rms_norm(x: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """``x [..., h]``, ``weight [h] -> y [..., h]``."""
    y: Tensor = _GroupRMSNorm.apply(x, weight, group_size, eps)
    return y


class _GroupRMSNorm(torch.autograd.Function):
    """With n = x * scale, per group of ``size`` channels:

    dx = scale * (dy * weight - n * mean(dy * weight * n)),   dweight = sum(dy * n)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, size: int, eps: float) -> Tensor:
        rows, dtype = x.view(-1, x.shape[-1] // size, size), _wide(x.dtype)
        gamma = weight.to(dtype).view(rows.shape[1:])
        y, scale = empty_like(rows), rows.new_empty(*rows.shape[:2], 1, dtype=dtype)
        for block in row_blocks(rows):
            wide = rows[block].to(dtype)
            scale[block] = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            y[block] = (wide * scale[block]).mul_(gamma)
        ctx.save_for_backward(rows, gamma, scale)
        ctx.weight_dtype = weight.dtype
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gamma, scale = ctx.saved_tensors
        grads, x_grad, weight_grad = grad.reshape(rows.shape), empty_like(rows), torch.zeros_like(gamma)
        for block in row_blocks(rows):
            wide = grads[block].to(gamma.dtype)
            normed = rows[block].to(gamma.dtype) * scale[block]
            weight_grad += (wide * normed).sum(0)
            pulled = wide * gamma
            along = (pulled * normed).mean(-1, keepdim=True)
            x_grad[block] = pulled.sub_(normed.mul_(along)).mul_(scale[block])
        return x_grad.view(grad.shape), weight_grad.flatten().to(ctx.weight_dtype), None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which statistics are taken."""
    return torch.promote_types(dtype, torch.float32)
