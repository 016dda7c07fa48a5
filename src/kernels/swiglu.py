"""SwiGLU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import DTYPES, launch, warps

BLOCK = 2048


def supports(gate: Tensor, up: Tensor) -> bool:
    """Whether the kernel serves these: nothing is broadcast or promoted."""
    return gate.dtype in DTYPES and gate.dtype == up.dtype and gate.shape == up.shape


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, rounded once."""
    y: Tensor = _SwiGLU.apply(gate, up)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        _launch(_forward, gate, up, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _launch(_backward, gate, up, dy.contiguous(), dgate, dup)
        return dgate, dup


def _launch(kernel: Any, gate: Tensor, *others: Tensor) -> None:
    size = gate.numel()
    launch(kernel, (triton.cdiv(size, BLOCK),), gate, *others, size, BLOCK=BLOCK, num_warps=warps(BLOCK))


@triton.jit
def _forward(gate, up, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    g = tl.load(gate + at, mask, 0.0).to(tl.float32)
    u = tl.load(up + at, mask, 0.0).to(tl.float32)
    tl.store(y + at, (g / (1 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask)


@triton.jit
def _backward(gate, up, dy, dgate, dup, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    g = tl.load(gate + at, mask, 0.0).to(tl.float32)
    u = tl.load(up + at, mask, 0.0).to(tl.float32)
    slope = tl.load(dy + at, mask, 0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    tl.store(dgate + at, (slope * u * sigmoid * (1 + g * (1 - sigmoid))).to(dgate.dtype.element_ty), mask)
    tl.store(dup + at, (slope * g * sigmoid).to(dup.dtype.element_ty), mask)
