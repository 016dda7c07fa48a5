"""RMS norm of groups of channels, of a sum on request."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import DTYPES, aligned, launch, power_of_two, warps

TILE = 2048
WIDEST = 16384
PARTS = 256


def supports(x: Tensor, weight: Tensor, group_size: int, residual: Tensor | None = None) -> bool:
    """Whether the kernel serves these: wider groups do not fit in the registers of one program."""
    fits = weight.shape == x.shape[-1:] and 0 < group_size <= WIDEST and x.shape[-1] % group_size == 0
    plain = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    return fits and plain and x.dtype in DTYPES and weight.dtype in DTYPES


def group_rms_norm(x: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """``x [..., h]``, ``weight [h]`` -> ``[..., h]``; see ``functional.group_rms_norm``."""
    y: Tensor = _GroupRMSNorm.apply(x, weight, group_size, eps)
    return y


def add_group_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, group_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """``x, residual [..., h]``, ``weight [h]`` -> norm and sum ``[..., h]``; see ``functional.add_group_rms_norm``."""
    y, total = _AddGroupRMSNorm.apply(x, residual, weight, group_size, eps)
    return y, total


class _GroupRMSNorm(torch.autograd.Function):
    """Nothing is saved but the inputs: the statistics of a group cost no memory traffic when it is read again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, size: int, eps: float) -> Tensor:
        x, weight = aligned(x), aligned(weight)
        ctx.save_for_backward(x, weight)
        ctx.size, ctx.eps = size, eps
        y = torch.empty_like(x)
        _normalize(y, x, weight, size, eps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, *ctx.needs_input_grad[:2]), None, None


class _AddGroupRMSNorm(torch.autograd.Function):
    """Of the sum, rounded as it is returned; it alone is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, size: int, eps: float) -> tuple[Tensor, Tensor]:
        x, residual, weight = aligned(x), aligned(residual), aligned(weight)
        y, total = torch.empty_like(x), torch.empty_like(x)
        _normalize(y, x, weight, size, eps, residual, total)
        ctx.save_for_backward(total, weight)
        ctx.size, ctx.eps = size, eps
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, *_ = ctx.needs_input_grad
        dx, dweight = _gradients(ctx, dy, x or residual, weight, aligned(dtotal))
        return dx, dx, dweight, None, None


def _normalize(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    size: int,
    eps: float,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    block = power_of_two(size)
    tile, groups = max(1, TILE // block), x.numel() // size
    settings = {"GROUPS": weight.numel() // size, "SIZE": size, "TILE": tile, "BLOCK": block}
    arguments = (x, residual, weight, y, total, groups, eps)
    launch(_forward, (triton.cdiv(groups, tile),), *arguments, **settings, num_warps=warps(tile * block))


def _gradients(
    ctx: Any, dy: Tensor, by_x: bool, by_weight: bool, dtotal: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """In what was normalized, ``dtotal`` included, and in the weight, where they are wanted."""
    (x, weight), size = ctx.saved_tensors, ctx.size
    width, block = weight.numel(), power_of_two(size)
    rows = x.numel() // width
    # The number of rows alone decides how they are cut and summed: the gradient's bits depend on nothing else.
    height = min(64, power_of_two(max(1, rows // PARTS)))
    tile = min(power_of_two(width // size), max(1, TILE // block))
    grid = (triton.cdiv(rows, height), triton.cdiv(width, tile * size))
    dx = torch.empty_like(x) if by_x else None
    partial = x.new_empty(grid[0], width, dtype=torch.float32) if by_weight else None
    settings = {"WIDTH": width, "SIZE": size, "TILE": tile, "BLOCK": block, "ROWS": height}
    arguments = (x, weight, aligned(dy), dtotal, dx, partial, rows, ctx.eps)
    launch(_backward, grid, *arguments, **settings, num_warps=warps(tile * block))
    return dx, None if partial is None else partial.sum(0).to(weight.dtype)


@triton.jit
def _forward(
    x,
    residual,
    weight,
    y,
    total,
    groups,
    eps,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``TILE`` groups that lie one behind the other in memory, whatever rows they belong to."""
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    mask = (group < groups) & (lane < SIZE)
    values = tl.load(x + group * SIZE + lane, mask, 0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + group * SIZE + lane, mask, 0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + group * SIZE + lane, rounded, mask)
        values = rounded.to(tl.float32)
    gain = tl.load(weight + group % GROUPS * SIZE + lane, mask, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / SIZE + eps)
    tl.store(y + group * SIZE + lane, (values * scale * gain).to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    x,
    weight,
    dy,
    dtotal,
    dx,
    partial,
    rows,
    eps,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``ROWS`` rows of ``TILE`` groups, and the sum of these rows' gradients of ``weight``.

    A row is loaded a second time, from the cache, once its sums are known: wide ones do not stay in registers.
    """
    column = (tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]) * SIZE + tl.arange(0, BLOCK)[None, :]
    inside = (tl.arange(0, BLOCK)[None, :] < SIZE) & (column < WIDTH)
    total = tl.zeros([TILE, BLOCK], tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        at = row * WIDTH + column
        mask = inside & (row < rows)
        values = tl.load(x + at, mask, 0.0, eviction_policy="evict_last").to(tl.float32)
        pulled = tl.load(dy + at, mask, 0.0, eviction_policy="evict_last").to(tl.float32)
        pulled *= tl.load(weight + column, inside, 0.0, eviction_policy="evict_last").to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / SIZE + eps)
        mean = tl.sum(values * pulled, 1, keep_dims=True) * scale / SIZE

        normed = tl.load(x + at, mask, 0.0, eviction_policy="evict_first").to(tl.float32) * scale
        slope = tl.load(dy + at, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
        gain = tl.load(weight + column, inside, 0.0).to(tl.float32)
        total += tl.where(mask, slope * normed, 0.0)
        if dx is not None:
            result = scale * (slope * gain - normed * mean)
            if dtotal is not None:
                result += tl.load(dtotal + at, mask, 0.0).to(tl.float32)
            tl.store(dx + at, result.to(dx.dtype.element_ty), mask)
    if partial is not None:
        tl.store(partial + tl.program_id(0).to(tl.int64) * WIDTH + column, total, inside)
