"""Lookups in a slice of a table of embeddings."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import DTYPES, aligned, launch, power_of_two, warps

TILE = 2048
TOKENS, COLUMNS = 4, 1024


def supports(ids: Tensor, table: Tensor) -> bool:
    """Whether the kernel serves these."""
    return ids.dtype in (torch.int32, torch.int64) and table.dtype in DTYPES and 0 not in table.shape


def shard_embedding(ids: Tensor, table: Tensor, first: int) -> Tensor:
    """Rows of ``table [n, e]`` for ids in ``[first, first + n)``, zeros for others; see ``functional``."""
    rows: Tensor = _ShardEmbedding.apply(ids, table, first)
    return rows


class _ShardEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, first: int) -> Tensor:
        ids, table = ids.contiguous(), table.contiguous()
        height, width = table.shape
        ctx.save_for_backward(ids)
        ctx.first, ctx.height, ctx.dtype = first, height, table.dtype
        out = table.new_empty(*ids.shape, width)
        block = min(TILE, power_of_two(width))
        tile = TILE // block
        grid = (triton.cdiv(ids.numel(), tile), triton.cdiv(width, block))
        settings = {"WIDTH": width, "BLOCK": block, "TILE": tile}
        launch(_gather, grid, ids, table, out, ids.numel(), first, height, **settings, num_warps=warps(TILE))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        width = dy.shape[-1]
        # A stable sort keeps the tokens of one id in their order: each row of the gradient is a sum in a fixed order.
        # Ids of other shards come before row 0 and after the last one.
        found, order = (ids.flatten() - ctx.first).sort(stable=True)
        starts = torch.searchsorted(found, torch.arange(ctx.height + 1, device=ids.device, dtype=found.dtype))
        grad = dy.new_empty(ctx.height, width, dtype=ctx.dtype)
        block = min(COLUMNS, power_of_two(width))
        settings = {"WIDTH": width, "BLOCK": block, "TOKENS": TOKENS}
        grid = (ctx.height, triton.cdiv(width, block))
        launch(_sum, grid, order, starts, aligned(dy), grad, **settings, num_warps=warps(2 * COLUMNS))
        return None, grad, None


@triton.jit
def _gather(
    ids,
    table,
    out,
    size,
    first,
    height,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = tl.load(ids + token, token < size, -1).to(tl.int64) - first
    owned = (token < size) & (row >= 0) & (row < height)
    values = tl.load(table + row * WIDTH + column, owned & (column < WIDTH), 0.0)
    tl.store(out + token * WIDTH + column, values, (token < size) & (column < WIDTH))


@triton.jit
def _sum(order, starts, dy, grad, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """One row of the gradient, written once: the sum over its tokens, zero if it has none."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    start, stop = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    while start < stop:
        place = start + tl.arange(0, TOKENS)[:, None]
        token = tl.load(order + place, place < stop, 0)
        total += tl.load(dy + token * WIDTH + column, (place < stop) & (column < WIDTH), 0.0).to(tl.float32)
        start += TOKENS
    summed = tl.sum(total, 0, keep_dims=True)
    tl.store(grad + row * WIDTH + column, summed.to(grad.dtype.element_ty), column < WIDTH)
