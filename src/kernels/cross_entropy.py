"""Cross-entropy over one logical shard of the vocabulary: statistics of the logits, and their gradient."""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES, aligned, launch, warps

BLOCK = 4096


class Piece(Protocol):
    """A logical shard: its first vocabulary id, its columns in the local logits, and how many of them are real."""

    first: int
    start: int
    stop: int
    valid: int


def supports(rows: Tensor, targets: Tensor) -> bool:
    """Whether the kernels serve these."""
    return rows.dtype in DTYPES and targets.dtype == torch.int64 and rows.is_contiguous() and targets.is_contiguous()


def cross_entropy_statistics(rows: Tensor, targets: Tensor, piece: Piece, with_sum: bool) -> Tensor:
    """``rows [n, columns]``, ``targets [n]`` -> ``[3 or 4, n]`` in float32.

    Maximum, sum of exponentials below it, target logit (0 if it lies elsewhere), sum of the logits below the maximum.
    Each row belongs to one program: its numbers do not depend on the other rows.
    """
    out = rows.new_zeros(4 if with_sum else 3, len(rows), dtype=torch.float32)
    if piece.valid:
        vector = 16 // rows.element_size()
        settings = {"VALID": piece.valid, "LANES": BLOCK // vector, "VECTOR": vector, "WITH_SUM": with_sum}
        width, shard, shards = _layout(rows, piece)
        arguments = (aligned(rows), targets, out, len(rows), shard, shards, piece.first)
        launch(_statistics, (len(rows),), *arguments, WIDTH=width, **settings, num_warps=warps(BLOCK))
    return out


def cross_entropy_gradient(
    out: Tensor,
    rows: Tensor,
    targets: Tensor,
    piece: Piece,
    statistics: tuple[Tensor, Tensor],
    slopes: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the columns of ``piece`` of the gradient ``out [n, columns]``; those that pad the vocabulary become 0.

    ``statistics [n]``: maximum and log of the sum below it. ``slopes [n]``: of the softmax, of the target's logit and
    of every logit.
    """
    width, shard, shards = _layout(rows, piece)
    settings = {"WIDTH": width, "VALID": piece.valid, "BLOCK": BLOCK}
    vectors = [vector.contiguous() for vector in (*statistics, *slopes)]
    grid = (len(rows), triton.cdiv(width, BLOCK))
    places = (shard, shards, piece.first)
    launch(_gradient, grid, rows, out, targets, *vectors, *places, **settings, num_warps=warps(BLOCK))


def _layout(rows: Tensor, piece: Piece) -> tuple[int, int, int]:
    """Width of a logical shard, which of the shards here it is, and their number."""
    width = piece.stop - piece.start
    return width, piece.start // width, rows.shape[1] // width


# Where a shard begins follows from its constant width, and is not specialized on: a shard among others is loaded, and
# so summed, like the only one of a rank.
@triton.jit(do_not_specialize=["shard", "shards", "first"])
def _statistics(
    logits,
    targets,
    out,
    rows,
    shard,
    shards,
    first,
    WIDTH: tl.constexpr,
    VALID: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    WITH_SUM: tl.constexpr,
):
    """Each lane keeps a maximum and a sum of its own, combined once after the loop: one exponential a logit.

    A lane is one 128-bit load wide, so that the loop passes nothing between threads.
    """
    LOWEST: tl.constexpr = -3.4028234663852886e38
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES) * VECTOR
    logits += (row * shards + shard) * WIDTH
    at = lane[:, None] + tl.arange(0, VECTOR)[None, :]
    top = tl.full([LANES], LOWEST, tl.float32)
    exps = tl.zeros([LANES], tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    seen = tl.zeros([LANES], tl.float32)
    for start in range(0, VALID, LANES * VECTOR):
        real = start + at < VALID
        x = tl.load(logits + start + at, real, float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 1))
        below = x - higher[:, None]
        exps = exps * tl.exp(top - higher) + tl.sum(tl.exp(below), 1)
        if WITH_SUM:
            sums += tl.where(seen > 0, seen * (top - higher), 0.0) + tl.sum(tl.where(real, below, 0.0), 1)
            seen += tl.minimum(tl.maximum(VALID - start - lane, 0), VECTOR).to(tl.float32)
        top = higher
    highest = tl.max(top, 0)
    tl.store(out + row, highest)
    tl.store(out + rows + row, tl.sum(exps * tl.exp(top - highest), 0))
    column = tl.load(targets + row) - first
    owned = (column >= 0) & (column < VALID)
    tl.store(out + 2 * rows + row, tl.load(logits + column, owned, 0.0).to(tl.float32))
    if WITH_SUM:
        sums += tl.where(seen > 0, seen * (top - highest), 0.0)
        tl.store(out + 3 * rows + row, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["shard", "shards", "first"])
def _gradient(
    logits,
    out,
    targets,
    top,
    log_sum,
    by_softmax,
    by_target,
    by_all,
    shard,
    shards,
    first,
    WIDTH: tl.constexpr,
    VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = (row * shards + shard) * WIDTH + column
    x = tl.load(logits + place, column < VALID, 0.0).to(tl.float32)
    softmax = tl.exp(x - tl.load(top + row) - tl.load(log_sum + row))
    slope = softmax * tl.load(by_softmax + row) - tl.load(by_all + row)
    slope = tl.where(column == tl.load(targets + row) - first, slope - tl.load(by_target + row), slope)
    slope = tl.where(column < VALID, slope, 0.0)
    tl.store(out + place, slope.to(out.dtype.element_ty), column < WIDTH)
