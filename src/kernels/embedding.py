"""Lookups in a slice of a table of embeddings."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .accumulation import gradient_of_rows, is_added_to_grad, is_first_of_backward
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
        # A stable sort keeps the tokens of one id in their order: each row of the gradient is a sum in a fixed order.
        # Ids of other shards come before row 0 and after the last one.
        found, order = (ids.flatten() - ctx.first).sort(stable=True)
        starts = torch.searchsorted(found, torch.arange(ctx.height + 1, device=ids.device, dtype=found.dtype))
        node = ctx.next_functions[1][0]
        if len(found) < ctx.height and is_added_to_grad(node) and is_first_of_backward(node):
            rows = _rows(starts, len(found))
            return None, gradient_of_rows(rows, _sums(order, starts, dy, ctx.dtype, rows), ctx.height), None
        return None, _sums(order, starts, dy, ctx.dtype), None


def _rows(starts: Tensor, count: int) -> Tensor:
    """``count`` rows of the table, sorted: all that have tokens, and others to make up the number.

    The host would have to wait to be told how many have. The others get zeros.
    """
    with_tokens_first = (starts[:-1] < starts[1:]).sort(descending=True, stable=True).indices
    return with_tokens_first[:count].sort().values


def _sums(order: Tensor, starts: Tensor, dy: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """The sums of ``dy`` over the tokens of each row, of all rows of the table or of ``rows``."""
    height, width = len(starts) - 1 if rows is None else len(rows), dy.shape[-1]
    sums = dy.new_empty(height, width, dtype=dtype)
    block = min(COLUMNS, power_of_two(width))
    settings = {"WIDTH": width, "BLOCK": block, "TOKENS": TOKENS}
    grid = (height, triton.cdiv(width, block))
    launch(_sum, grid, order, starts, rows, aligned(dy), sums, **settings, num_warps=warps(2 * COLUMNS))
    return sums


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
def _sum(order, starts, rows, dy, sums, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr):
    """One row, written once: the sum over its tokens, zero if it has none."""
    index = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = index if rows is None else tl.load(rows + index)
    start, stop = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    while start < stop:
        place = start + tl.arange(0, TOKENS)[:, None]
        token = tl.load(order + place, place < stop, 0)
        total += tl.load(dy + token * WIDTH + column, (place < stop) & (column < WIDTH), 0.0).to(tl.float32)
        start += TOKENS
    summed = tl.sum(total, 0, keep_dims=True)
    tl.store(sums + index * WIDTH + column, summed.to(sums.dtype.element_ty), column < WIDTH)
