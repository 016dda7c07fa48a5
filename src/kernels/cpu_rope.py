"""Rotary embeddings of heads of two halves on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import empty_like
from .row_blocks import learns, row_blocks

MIN_ELEMENTS = 2**19
"""From how many elements on blocks gain more than they cost."""


def supports(heads: tuple[Tensor, ...], rotation: tuple[Tensor, ...]) -> bool:
    """Whether blocks are faster: tables of halves that need no gradient."""
    if any(x.numel() < MIN_ELEMENTS or x.dim() != 4 or x.shape[-1] % 2 or not x.is_contiguous() for x in heads):
        return False
    if len(rotation) != 2 or rotation[0].shape != rotation[1].shape or learns(*rotation):
        return False
    return all(rotation[0].shape in ((x.shape[1], x.shape[3]), (*x.shape[:2], x.shape[3])) for x in heads)


def rotate(heads: tuple[Tensor, ...], rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Each of ``heads``, ``[b, s, nh, hd]``, turned by ``(cos, sin)``, ``[s, hd]`` or ``[b, s, hd]`` each."""
    return tuple(_RotateHalves.apply(x, *rotation) for x in heads)


class _RotateHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, *sin.chunk(2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return _rotated(grad, cos, -second, -first), None, None


def _rotated(x: Tensor, cos: Tensor, first_sin: Tensor, second_sin: Tensor) -> Tensor:
    """``(x1 * cos1 - x2 * first_sin, x2 * cos2 + x1 * second_sin)`` over the two halves of the last dim."""
    dtype, half = torch.promote_types(x.dtype, cos.dtype), x.shape[-1] // 2
    y = empty_like(x)
    rows, places = x.reshape(-1, *x.shape[2:]), y.view(-1, *x.shape[2:])
    cos, first_sin, second_sin = (
        table.to(dtype).expand(*x.shape[:2], -1).reshape(len(rows), 1, -1) for table in (cos, first_sin, second_sin)
    )
    for block in row_blocks(rows):
        wide = rows[block].to(dtype)
        out = torch.mul(wide, cos[block], out=places[block] if y.dtype == dtype else None)
        out[..., :half] -= wide[..., half:] * first_sin[block]
        out[..., half:] += wide[..., :half] * second_sin[block]
        places[block] = out
    return y
