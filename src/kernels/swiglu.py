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
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _launch(_forward, (gate, up), (y,))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
        _launch(_backward, (gate, up, dy), (dgate, dup))
        return dgate, dup


def _launch(kernel: Any, read: tuple[Tensor, ...], written: tuple[Tensor, ...]) -> None:
    """``read`` are taken row by row where their rows lie apart, as halves of one product do; no half is copied."""
    dense = all(x.is_contiguous() for x in read)
    rows = [x.view(1, -1) if dense else _rows(x) for x in read]
    height, width = rows[0].shape
    blocks = triton.cdiv(width, BLOCK)
    places = (*(x.stride(0) for x in rows), width, blocks)
    launch(kernel, (height * blocks,), *rows, *written, *places, BLOCK=BLOCK, num_warps=warps(BLOCK))


def _rows(x: Tensor) -> Tensor:
    """``x [..., columns]`` as ``[rows, columns]``, copied only where rows have gaps or no common distance."""
    rows = x.view(1, -1) if x.dim() < 2 else x.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def _forward(gate, up, y, gate_row, up_row, width, blocks, BLOCK: tl.constexpr):
    row, column = _place(blocks, BLOCK)
    mask = column < width
    g = tl.load(gate + row * gate_row + column, mask, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask, 0.0).to(tl.float32)
    tl.store(y + row * width + column, (g / (1 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask)


@triton.jit
def _backward(gate, up, dy, dgate, dup, gate_row, up_row, dy_row, width, blocks, BLOCK: tl.constexpr):
    row, column = _place(blocks, BLOCK)
    mask = column < width
    g = tl.load(gate + row * gate_row + column, mask, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask, 0.0).to(tl.float32)
    slope = tl.load(dy + row * dy_row + column, mask, 0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    at = row * width + column
    tl.store(dgate + at, (slope * u * sigmoid * (1 + g * (1 - sigmoid))).to(dgate.dtype.element_ty), mask)
    tl.store(dup + at, (slope * g * sigmoid).to(dup.dtype.element_ty), mask)


@triton.jit
def _place(blocks, BLOCK: tl.constexpr):
    """Row and columns of a program: each row is cut into ``blocks``."""
    block = tl.program_id(0)
    return (block // blocks).to(tl.int64), (block % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
