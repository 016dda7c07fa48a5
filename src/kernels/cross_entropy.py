"""Cross-entropy over one logical shard of the vocabulary: statistics of the logits, and their gradient."""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES, aligned, launch, warps

BLOCK = 4096
TOKENS = 256
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""In place of -inf, where a row has nothing else."""


class Piece(Protocol):
    """A logical shard: its first vocabulary id, its columns in the local logits, and how many of them are real."""

    first: int
    start: int
    stop: int
    valid: int


class Criterion(Protocol):
    """What is asked of a cross-entropy; the slopes of a token's loss in its target's and in every logit, negated."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def ignore_index(self) -> int: ...
    @property
    def z_loss(self) -> float: ...
    @property
    def slopes(self) -> tuple[float, float]: ...


def supports(rows: Tensor, targets: Tensor) -> bool:
    """Whether the kernels serve these."""
    return rows.dtype in DTYPES and targets.dtype == torch.int64 and rows.is_contiguous() and targets.is_contiguous()


def cross_entropy_statistics(rows: Tensor, targets: Tensor, piece: Piece, with_sum: bool) -> Tensor:
    """``rows [n, columns]``, ``targets [n]`` -> ``[2 or 3, n]`` in float32.

    The two words of ``modeling.loss_words``, and the sum of the logits below their log-sum-exp. Each row belongs to one
    program: its numbers do not depend on the other rows.
    """
    new = rows.new_empty if piece.valid else rows.new_zeros
    out = new(3 if with_sum else 2, len(rows), dtype=torch.float32)
    if piece.valid:
        vector = 16 // rows.element_size()
        settings = {"VALID": piece.valid, "LANES": BLOCK // vector, "VECTOR": vector, "WITH_SUM": with_sum}
        width, shard, shards = _layout(rows, piece)
        arguments = (aligned(rows), targets, out, len(rows), shard, shards, piece.first)
        launch(_statistics, (len(rows),), *arguments, WIDTH=width, **settings, num_warps=warps(BLOCK))
    return out


def cross_entropy_losses(
    statistics: Tensor, targets: Tensor, width: int, criterion: Criterion
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics ``[V, 2 or 3, n]`` of all logical shards -> losses, largest log-sum-exp of a shard, log of the sum
    below it, ``[n]`` each.

    Shards are summed in their order, the same way on every rank.
    """
    size = len(targets)
    loss, top, log_sum = statistics.new_empty(3, size).unbind(0)
    settings = {"SHARDS": triton.cdiv(criterion.vocab_size, width), "KINDS": statistics.shape[1], "TOKENS": TOKENS}
    arguments = (statistics, targets, loss, top, log_sum, size, width, *_options(criterion))
    launch(_losses, (triton.cdiv(size, TOKENS),), *arguments, **settings, num_warps=2)
    return loss, top, log_sum


def cross_entropy_gradient(
    out: Tensor,
    rows: Tensor,
    targets: Tensor,
    piece: Piece,
    statistics: tuple[Tensor, Tensor],
    grad: Tensor,
    criterion: Criterion,
) -> None:
    """Write the columns of ``piece`` of the gradient ``out [n, columns]``; those that pad the vocabulary become 0.

    ``statistics [n]``: a shift and log of the sum of exponentials below it. ``grad [n]``: that of the losses.
    """
    width, shard, shards = _layout(rows, piece)
    settings = {"WIDTH": width, "VALID": piece.valid, "BLOCK": BLOCK}
    vectors = [vector.contiguous() for vector in (*statistics, grad)]
    grid = (len(rows), triton.cdiv(width, BLOCK))
    arguments = (*vectors, *_options(criterion)[1:], shard, shards, piece.first)
    launch(_gradient, grid, rows, out, targets, *arguments, **settings, num_warps=warps(BLOCK))


def _options(criterion: Criterion) -> tuple[int, int, float, float, float]:
    return criterion.vocab_size, criterion.ignore_index, *criterion.slopes, criterion.z_loss


def _layout(rows: Tensor, piece: Piece) -> tuple[int, int, int]:
    """Width of a logical shard, which of the shards here it is, and their number."""
    width = piece.stop - piece.start
    return width, piece.start // width, rows.shape[1] // width


@triton.jit
def _encode(top, exps, target, owned):
    log_sum = tl.log(exps)
    lse = top + log_sum
    logit = tl.where(owned, target, top)
    loss = top - tl.maximum(logit, LOWEST) + log_sum
    far = loss > tl.abs(lse)
    return tl.where(far, lse, logit), tl.where(far, logit - lse, loss)


@triton.jit
def _decode_lse(first, second):
    return tl.maximum(first, LOWEST), tl.where(second < 0, 0.0, second)  # NaN stays NaN


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
    total = tl.sum(exps * tl.exp(top - highest), 0)
    # No logit lies above the lowest number: all count as it. What is not a number stays so.
    every = tl.maximum(total, VALID, propagate_nan=tl.PropagateNan.ALL)
    total = tl.where(highest > LOWEST, total, every)
    column = tl.load(targets + row) - first
    owned = (column >= 0) & (column < VALID)
    logit = tl.load(logits + column, owned, 0.0).to(tl.float32)
    one, other = _encode(highest, total, logit, owned)
    tl.store(out + row, one)
    tl.store(out + rows + row, other)
    if WITH_SUM:
        sums += tl.where(seen > 0, seen * (top - highest), 0.0)
        start, rest = _decode_lse(one, other)
        tl.store(out + 2 * rows + row, tl.sum(sums, 0) + VALID * (highest - (start + rest)))


@triton.jit(do_not_specialize=["vocab_size", "ignored"])
def _losses(
    statistics,
    targets,
    loss,
    top_out,
    log_out,
    size,
    width,
    vocab_size,
    ignored,
    by_target,
    by_all,
    z_loss,
    SHARDS: tl.constexpr,
    KINDS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    mask = token < size
    target = tl.load(targets + token, mask, 0)
    statistics += token
    top = tl.full([TOKENS], LOWEST, tl.float32)
    for shard in tl.static_range(0, SHARDS):
        words = statistics + shard * KINDS * size
        start, rest = _decode_lse(tl.load(words, mask, 0.0), tl.load(words + size, mask, 0.0))
        top = tl.maximum(top, start + rest)
    exps = tl.zeros([TOKENS], tl.float32)
    logit = tl.zeros([TOKENS], tl.float32)
    below = tl.zeros([TOKENS], tl.float32)
    for shard in tl.static_range(0, SHARDS):
        words = statistics + shard * KINDS * size
        one, other = tl.load(words, mask, 0.0), tl.load(words + size, mask, 0.0)
        start, rest = _decode_lse(one, other)
        exps += tl.exp(start - top + rest)
        logit = tl.where(target // width == shard, one + tl.minimum(other, 0.0), logit)
        if KINDS == 3:
            shift = start + rest - top
            below += tl.load(words + 2 * size, mask, 0.0) + shift * tl.minimum(width, vocab_size - shard * width)
    log_sum = tl.log(exps)
    lse = top + log_sum
    total = log_sum - by_target * (logit - top)
    if KINDS == 3:
        total -= by_all * below
    if z_loss != 0:
        total += z_loss * lse * lse
    tl.store(loss + token, tl.where(target != ignored, total, 0.0), mask)
    tl.store(top_out + token, top, mask)
    tl.store(log_out + token, log_sum, mask)


@triton.jit(do_not_specialize=["ignored", "shard", "shards", "first"])
def _gradient(
    logits,
    out,
    targets,
    top,
    log_sum,
    grad,
    ignored,
    by_target,
    by_all,
    z_loss,
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
    x = tl.maximum(tl.load(logits + place, column < VALID, 0.0).to(tl.float32), LOWEST)
    highest, below, target = tl.load(top + row), tl.load(log_sum + row), tl.load(targets + row)
    pulled = tl.load(grad + row)
    softmax = tl.exp(x - highest - below)
    slope = softmax * (pulled * (1 + 2 * z_loss * (highest + below))) - pulled * by_all
    slope = tl.where(column == target - first, slope - pulled * by_target, slope)
    slope = tl.where((column < VALID) & (target != ignored), slope, 0.0)
    tl.store(out + place, slope.to(out.dtype.element_ty), column < WIDTH)
