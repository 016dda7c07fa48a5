"""Faster bodies on CPU tensors for what ``functional`` computes: blocks of rows that stay in cache, gradients by hand.

Forward has the bits of the plain bodies. Each function gives None where those are to be kept: in a compiled graph, for
tensors elsewhere, strided or of a class of their own, and for small ones, which blocks only slow down.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 2**17
"""Elements of one block of rows."""

WEIGHT_ELEMENTS = 2**20
"""Elements of one block of a weight that is widened."""

MIN_ELEMENTS = 2**17
"""From how many elements on blocks gain more than they cost, with gradients; for rotations four times as many, for
embeddings an eighth."""

MIN_ELEMENTS_FORWARD = 2**20
"""The same for norms without gradients."""

MAX_WIDTH = 2**15
"""From this width on torch lets several threads share the sum over a single row, which changes its bits."""

MIN_ROWS = 8
"""From how many rows on a widened product is the faster one: a bfloat16 weight is half as much to read."""

HUGE_BYTES = 2**23
"""From this size on numpy asks the system for huge pages, where torch takes a page fault for every 4 KiB."""


def serves(x: Tensor, contiguous: bool = True) -> bool:
    """Whether these bodies are made for ``x``."""
    if not x.is_cpu or (contiguous and not x.is_contiguous()) or torch.compiler.is_compiling():
        return False
    return (type(x) is Tensor or type(x) is torch.nn.Parameter) and x.numel() > 0


def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like``, contiguous, and cheap to fill where it is large."""
    return empty(x.shape, x.dtype) if serves(x) else torch.empty_like(x, memory_format=torch.contiguous_format)


def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU, cheap to fill where it is large."""
    if shape.numel() * dtype.itemsize >= HUGE_BYTES:
        return _allocated(np.empty, shape, dtype)
    return torch.empty(shape, dtype=dtype, device="cpu")


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones; other than x86 is left to torch."""
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported() or not cpu._is_avx2_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """A product that ``F.linear`` would take in bfloat16, taken in float32 and rounded once; None with fast units.

    ``x [..., in]``, ``weight [out, in]``, ``bias [out] -> [..., out]``.
    """
    if not _widens(x) or not weight.is_cpu:
        return None
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    if dtype != torch.bfloat16:
        return None
    bias = None if bias is None else bias.to(dtype)
    y: Tensor = _WideLinear.apply(x.to(dtype), weight.to(dtype), bias)  # type: ignore[no-untyped-call]
    return y


def linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor | None:
    """That of ``linear``: ``grad [n, out]``, ``weight [out, in] -> [n, in]``."""
    return _wide_input_grad(grad, weight) if _widens(grad) and grad.dtype == torch.bfloat16 else None


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor | None:
    """That of ``linear``: ``grad [n, out]``, ``x [n, in] -> [out, in]``."""
    return _wide_weight_grad(grad, x) if _widens(grad) and grad.dtype == torch.bfloat16 else None


def group_rms_norm(x: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor | None:
    """``x [..., h]``, ``weight [h] -> y [..., h]``."""
    if not serves(x) or not weight.is_cpu:
        return None
    if x.numel() < MIN_ELEMENTS_FORWARD and not _learns(x, weight):
        one_call = group_size == x.size(-1) and x.dtype == weight.dtype
        return torch.rms_norm(x, (group_size,), weight, eps) if one_call else None
    if x.numel() < MIN_ELEMENTS or x.size(-1) >= MAX_WIDTH or _wide(weight.dtype) != _wide(x.dtype):
        return None
    y: Tensor = _GroupRMSNorm.apply(x, weight, group_size, eps)  # type: ignore[no-untyped-call]
    return y


def shard_embedding(ids: Tensor, table: Tensor, first: int) -> Tensor | None:
    """Rows of ``table [n, e]`` for the ids in ``[first, first + n)``, zeros for all others: ``[..., e]``."""
    if not serves(ids) or not table.is_cpu or not table.is_floating_point():
        return None
    if ids.numel() * table.shape[1] < MIN_ELEMENTS // 8:  # never by the table's size, which depends on the world's
        return None
    rows: Tensor = _ShardEmbedding.apply(ids, table, first)  # type: ignore[no-untyped-call]
    return rows


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """``x [b, s, nh, hd]`` turned by tables ``[s, hd]`` or ``[b, s, hd]``, unless those have gradients."""
    if not serves(x) or x.numel() < 4 * MIN_ELEMENTS or not cos.is_cpu or _learns(cos, sin):
        return None
    y: Tensor = _RotateHalves.apply(x, cos, sin)  # type: ignore[no-untyped-call]
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
        for block in _blocks(rows):
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
        for block in _blocks(rows):
            wide = grads[block].to(gamma.dtype)
            normed = rows[block].to(gamma.dtype) * scale[block]
            weight_grad += (wide * normed).sum(0)
            pulled = wide * gamma
            along = (pulled * normed).mean(-1, keepdim=True)
            x_grad[block] = pulled.sub_(normed.mul_(along)).mul_(scale[block])
        return x_grad.view(grad.shape), weight_grad.flatten().to(ctx.weight_dtype), None, None


class _ShardEmbedding(torch.autograd.Function):
    """Each id is a bag of one row, or of none where the row lies elsewhere."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, first: int) -> Tensor:
        local = ids.reshape(-1).long() - first
        owned = (local >= 0) & (local < table.shape[0])
        found = local[owned]
        ctx.save_for_backward(found, owned)
        ctx.table_shape = table.shape
        rows: Tensor = torch.embedding_bag(table, found, owned.cumsum(0) - owned.long())[0]
        return rows.view(*ids.shape, table.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found, owned = ctx.saved_tensors
        total = _zeros(ctx.table_shape, grad.dtype)
        total.index_add_(0, found, grad.reshape(-1, grad.shape[-1])[owned])
        return None, total, None


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


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        rows, y = x.reshape(-1, x.shape[-1]).float(), x.new_empty(*x.shape[:-1], weight.shape[0])
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(weight, WEIGHT_ELEMENTS):
                part = F.linear(rows, weight[block].float(), None if bias is None else bias[block].float())
                y.view(-1, weight.shape[0])[:, block] = part
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads, needed = grad.reshape(-1, weight.shape[0]), ctx.needs_input_grad
        x_grad = _wide_input_grad(grads, weight).view(x.shape) if needed[0] else None
        weight_grad = _wide_weight_grad(grads, x.reshape(-1, x.shape[-1])) if needed[1] else None
        return x_grad, weight_grad, grads.sum(0) if ctx.biased else None


def _widens(x: Tensor) -> bool:
    """Whether a product of ``x [..., n]``, should it be one in bfloat16, is taken in float32."""
    return serves(x, contiguous=False) and not has_bfloat16_units() and x.numel() >= MIN_ROWS * x.size(-1)


def _wide_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    total = grad.new_zeros(len(grad), weight.shape[1], dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(weight, WEIGHT_ELEMENTS):
            total.addmm_(grad[:, block].float(), weight[block].float())
    return total.to(grad.dtype)


def _wide_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    rows, total = x.float(), empty_like(grad.new_empty(grad.shape[1], x.shape[1]))
    with torch.autocast("cpu", enabled=False):
        for block in _blocks(total, WEIGHT_ELEMENTS):
            total[block] = grad[:, block].float().T @ rows
    return total


def _rotated(x: Tensor, cos: Tensor, first_sin: Tensor, second_sin: Tensor) -> Tensor:
    """``(x1 * cos1 - x2 * first_sin, x2 * cos2 + x1 * second_sin)`` over the two halves of the last dim."""
    dtype, half = torch.promote_types(x.dtype, cos.dtype), x.shape[-1] // 2
    rows = x.reshape(-1, *x.shape[2:])
    cos, first_sin, second_sin = (
        table.to(dtype).expand(*x.shape[:2], -1).reshape(len(rows), 1, -1) for table in (cos, first_sin, second_sin)
    )
    y = empty_like(rows)
    for block in _blocks(rows):
        wide = rows[block].to(dtype)
        out = wide * cos[block]
        out[..., :half] -= wide[..., half:] * first_sin[block]
        out[..., half:] += wide[..., :half] * second_sin[block]
        y[block] = out
    return y.view(x.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which statistics are taken."""
    return torch.promote_types(dtype, torch.float32)


def _learns(*tensors: Tensor) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _blocks(x: Tensor, elements: int = BLOCK_ELEMENTS) -> list[slice]:
    """Runs of the first dim of ``x``, of about ``elements`` elements each."""
    height = max(1, elements * len(x) // x.numel())
    return [slice(i, i + height) for i in range(0, len(x), height)]


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros; where there are many, the system provides the pages that are written: few rows of a table are."""
    if shape.numel() * dtype.itemsize >= HUGE_BYTES:
        return _allocated(np.zeros, shape, dtype)
    return torch.zeros(shape, dtype=dtype)


def _allocated(make: Callable[..., np.ndarray[Any, Any]], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor over an array of numpy's, aligned as torch's own are."""
    size = shape.numel() * dtype.itemsize
    array = make(size + 64, np.uint8)
    start = -array.ctypes.data % 64
    return torch.from_numpy(array[start : start + size]).view(dtype).view(shape)
