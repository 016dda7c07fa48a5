"""RMS norm of groups of channels."""

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


def supports(x: Tensor, weight: Tensor, group_size: int) -> bool:
    """Whether the kernel serves these: wider groups do not fit in the registers of one program."""
    fits = weight.shape == x.shape[-1:] and 0 < group_size <= WIDEST and x.shape[-1] % group_size == 0
    return fits and x.dtype in DTYPES and weight.dtype in DTYPES


def group_rms_norm(x: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """``x [..., h]``, ``weight [h]`` -> ``[..., h]``; see ``functional.group_rms_norm``."""
    y: Tensor = _GroupRMSNorm.apply(x, weight, group_size, eps)
    return y


class _GroupRMSNorm(torch.autograd.Function):
    """Nothing is saved but the inputs: the statistics of a group cost no memory traffic when it is read again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, size: int, eps: float) -> Tensor:
        x, weight = aligned(x), aligned(weight)
        ctx.save_for_backward(x, weight)
        ctx.size, ctx.eps = size, eps
        y, block = torch.empty_like(x), power_of_two(size)
        tile, groups = max(1, TILE // block), x.numel() // size
        settings = {"GROUPS": weight.numel() // size, "SIZE": size, "TILE": tile, "BLOCK": block}
        launch(
            _forward, (triton.cdiv(groups, tile),), x, weight, y, groups, eps, **settings, num_warps=warps(tile * block)
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        width, size, block = weight.numel(), ctx.size, power_of_two(ctx.size)
        rows = x.numel() // width
        # The number of rows alone decides how they are cut and summed: the gradient's bits depend on nothing else.
        height = min(64, power_of_two(max(1, rows // PARTS)))
        tile = min(power_of_two(width // size), max(1, TILE // block))
        grid = (triton.cdiv(rows, height), triton.cdiv(width, tile * size))
        dx, partial = torch.empty_like(x), x.new_empty(grid[0], width, dtype=torch.float32)
        settings = {"WIDTH": width, "SIZE": size, "TILE": tile, "BLOCK": block, "ROWS": height}
        arguments = (x, weight, aligned(dy), dx, partial, rows, ctx.eps)
        launch(_backward, grid, *arguments, **settings, num_warps=warps(tile * block))
        return dx, partial.sum(0).to(weight.dtype), None, None


@triton.jit
def _forward(
    x,
    weight,
    y,
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
    gain = tl.load(weight + group % GROUPS * SIZE + lane, mask, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / SIZE + eps)
    tl.store(y + group * SIZE + lane, (values * scale * gain).to(y.dtype.element_ty), mask)


@triton.jit
def _backward(
    x,
    weight,
    dy,
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
        tl.store(dx + at, (scale * (slope * gain - normed * mean)).to(dx.dtype.element_ty), mask)
        total += tl.where(mask, slope * normed, 0.0)
    tl.store(partial + tl.program_id(0).to(tl.int64) * WIDTH + column, total, inside)
