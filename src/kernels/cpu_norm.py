"""RMS norms of groups of channels on CPUs: forward with the bits of the body in ``functional``, gradient by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import empty_like
from .row_blocks import learns, row_blocks, wide

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
    same = x.size(-1) == weight.numel() and wide(weight.dtype) == wide(x.dtype)
    return same and x.is_contiguous() and x.size(-1) < MAX_WIDTH


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
        dtype, y = wide(x.dtype), empty_like(x)
        rows, places = (tensor.view(-1, x.shape[-1] // size, size) for tensor in (x, y))
        gamma, scales = weight.to(dtype).view(rows.shape[1:]), rows.new_empty(*rows.shape[:2], 1, dtype=dtype)
        for block in row_blocks(rows):
            part = rows[block].to(dtype)
            scale = torch.rsqrt(part.square().mean(-1, keepdim=True) + eps, out=scales[block])
            place = places[block] if y.dtype == dtype else part
            places[block] = torch.mul(part, scale, out=place).mul_(gamma)
        ctx.save_for_backward(x, gamma, scales)
        ctx.weight_dtype = weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, scales = ctx.saved_tensors
        rows = x.view(-1, *gamma.shape)
        grads, weight_grad = grad.reshape(rows.shape), torch.zeros_like(gamma)
        x_grad = empty_like(rows) if ctx.needs_input_grad[0] else None
        for block in row_blocks(rows):
            part, scale = grads[block].to(gamma.dtype), scales[block]
            normed = rows[block].to(gamma.dtype) * scale
            product = part * normed
            weight_grad += product.sum(0)
            if x_grad is not None:
                along = product.mul_(gamma).mean(-1, keepdim=True)
                place = x_grad[block] if x_grad.dtype == gamma.dtype else part
                x_grad[block] = torch.mul(part, gamma, out=place).sub_(normed.mul_(along)).mul_(scale)
        x_grad = None if x_grad is None else x_grad.view(x.shape)
        return x_grad, weight_grad.flatten().to(ctx.weight_dtype), None, None
