"""Cross-entropy over a sharded vocabulary, logical shard by logical shard: statistics, token losses, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..distributed.collectives import all_gather
from ..distributed.group import Group
from ..distributed.reduction import tree_sum
from ..functional import wide
from ..kernels import lookup
from ..sharding import valid_size
from .loss_words import decode_logit, decode_lse, encode

Reduction = Literal["mean", "sum", "none"]

BLOCK_ELEMENTS = 2**17
"""Rows are taken in blocks of about this many logits: no wide copy of all logits ever exists."""


@dataclass(frozen=True)
class Criterion:
    """What is asked of a cross-entropy. Raises ValueError for options outside their range."""

    vocab_size: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 1]")
        if self.z_loss < 0:
            raise ValueError(f"z_loss={self.z_loss} must not be negative")
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction={self.reduction!r} is not "mean", "sum" or "none"')

    @property
    def slopes(self) -> tuple[float, float]:
        """Of a token's loss: in its target's logit and in every logit, both with the sign turned."""
        return 1 - self.label_smoothing, self.label_smoothing / self.vocab_size

    def reduce(self, per_token: Tensor, kept: Tensor, shape: torch.Size) -> Tensor:
        """Losses ``[n]``, of which the ``kept`` count, to what ``reduction`` names."""
        if self.reduction == "none":
            return per_token.view(shape)
        return per_token.sum() if self.reduction == "sum" else per_token.sum() / kept.sum()


@dataclass(frozen=True)
class Piece:
    """One logical shard: its first vocabulary id, its columns, how many of them are real, and in which tensor."""

    first: int
    start: int
    stop: int
    valid: int
    tensor: int = 0

    @classmethod
    def of(cls, shard: int, width: int, vocab_size: int, *, start: int = 0, tensor: int = 0) -> Piece:
        """Logical shard ``shard``, of ``width`` columns."""
        return cls(shard * width, start, start + width, valid_size(vocab_size, shard, width), tensor)

    @property
    def width(self) -> int:
        return self.stop - self.start

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.valid)

    def blocks(self, rows: Tensor) -> list[slice]:
        """Runs of rows, cut the same way at every world size; all where torch.compile makes one pass of it, or where
        there are no numbers."""
        num_rows = len(rows)
        if torch.compiler.is_compiling() or rows.is_meta:
            return [slice(0, num_rows)]
        height = max(1, BLOCK_ELEMENTS // max(self.valid, 1))
        return [slice(i, min(i + height, num_rows)) for i in range(0, num_rows, height)]

    def locate(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """``targets [n]`` -> whether each lies here, and its column (0 where it does not)."""
        column = targets - self.first
        owned = (column >= 0) & (column < self.valid)
        return owned, torch.where(owned, column, 0)


def statistics(rows: Tensor, targets: Tensor, piece: Piece, criterion: Criterion) -> Tensor:
    """``[2 or 3, n]``: the words of ``loss_words``; for label smoothing the sum of the logits below the log-sum-exp."""
    with_sum = criterion.label_smoothing > 0
    if kernel := lookup("cross_entropy_statistics", rows, targets):
        found: Tensor = kernel(rows, targets, piece, with_sum)
        return found
    if piece.valid == 0:
        return rows.new_zeros(3 if with_sum else 2, len(rows), dtype=wide(rows.dtype))
    owned, column = piece.locate(targets)
    tops, exps, logits, *below = rows.new_empty(4 if with_sum else 3, len(rows), dtype=wide(rows.dtype))
    lowest = torch.finfo(tops.dtype).min  # in place of -inf, where a row has nothing else
    for block in piece.blocks(rows):
        x = rows[block, piece.columns].to(tops.dtype)
        top = x.amax(-1)
        finite = x if _known(top > lowest) else x.clamp_min(lowest)
        tops[block] = top = top.clamp_min(lowest)
        if torch.compiler.is_compiling():  # Inductor keeps no exponentials that are used once
            exps[block] = (finite - top[:, None]).exp().sum(-1)
        else:
            exps[block] = torch.softmax(finite, -1).amax(-1).reciprocal()  # the largest is exp(0) over the sum
        logits[block] = x.gather(-1, column[block, None]).squeeze(-1)
        if with_sum:
            below[0][block] = (x - top[:, None]).sum(-1)
    words = encode(tops, exps, logits, owned)
    if with_sum:
        below[0].add_(tops - torch.add(*decode_lse(*words)), alpha=piece.valid)
    return torch.stack([*words, *below])


def token_losses(
    local: Tensor, targets: Tensor, width: int, group: Group, criterion: Criterion
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Statistics ``[pieces, k, n]`` -> losses ``[n]``, and what the gradient needs. The only collective.

    That is the statistics of this rank, and ``[n]`` each the largest log-sum-exp of a logical shard, log of the sum
    below it, targets, and whether they count.
    """
    gathered, kept = all_gather(local, group=group), targets != criterion.ignore_index
    if kernel := lookup("cross_entropy_losses", gathered, targets):
        per_token, top, log_sum = kernel(gathered, targets, width, criterion)
        return per_token, (local, top, log_sum, targets, kept)
    vocab_size, z_loss = criterion.vocab_size, criterion.z_loss
    by_target, by_all = criterion.slopes
    real = [n for n in (valid_size(vocab_size, j, width) for j in range(group.num_shards)) if n]
    owner = (targets // width).clamp(0, len(real) - 1)  # of a target that counts
    top, log_sum, target_logit, *sums = _combine(gathered, owner, real)
    per_token = log_sum - by_target * (target_logit - top)
    if sums:
        per_token -= by_all * sums[0]
    if z_loss:
        per_token += z_loss * (top + log_sum).square()
    return per_token.masked_fill(~kept, 0), (local, top, log_sum, targets, kept)


def _known(rows: Tensor) -> bool:
    """Whether all of ``rows`` are true, and it costs nothing to know: no GPU is waited for, no graph broken."""
    return type(rows) is Tensor and rows.is_cpu and not torch.compiler.is_compiling() and bool(rows.all())


def _combine(statistics: Tensor, owner: Tensor, real: list[int]) -> list[Tensor]:
    """``[V, k, n] -> k + 1`` tensors ``[n]``: largest log-sum-exp, log of the sum below it, logit of the target, which
    lies in logical shard ``owner [n]``, sum of the logits below the largest log-sum-exp.

    ``real`` has the number of real columns of each logical shard that has any; sums follow the fixed tree.
    """
    first, second, *below = statistics[: len(real)].unbind(1)
    start, rest = decode_lse(first, second)
    lse = start + rest
    top = lse.amax(0)
    log_sum = tree_sum((start - top + rest).exp().unbind(0)).log()
    sums = [tree_sum([s + n * d for s, n, d in zip(below[0], real, lse - top, strict=True)])] if below else []
    return [top, log_sum, decode_logit(first, second).gather(0, owner[None])[0], *sums]


def write_gradients(
    outs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    pieces: Sequence[Piece],
    saved: Sequence[Tensor],
    grad: Tensor,
    criterion: Criterion,
) -> None:
    """The gradient in ``tensors``, written to ``outs``, which may be the same: each logit is read before it is written.

    d per_token = (1 + 2 z lse) * softmax - slope_target * onehot(target) - slope_all

    ``grad [n]`` is that of the losses, ``saved`` comes from ``token_losses``.
    """
    local, top, log_sum, targets, kept = saved
    if kernel := lookup("cross_entropy_gradient", tensors[0], targets):
        for piece in pieces:
            kernel(outs[piece.tensor], tensors[piece.tensor], targets, piece, (top, log_sum), grad, criterion)
        return
    grad = grad.masked_fill(~kept, 0)[:, None]
    # What turns a softmax within a piece into the slope of the loss by log-sum-exp.
    start, rest = decode_lse(local[:, 0], local[:, 1])
    shares = (start - top + rest - log_sum).exp()
    if criterion.z_loss:
        shares *= 1 + 2 * criterion.z_loss * (top + log_sum)
    for piece, share in zip(pieces, shares, strict=True):
        out, rows = outs[piece.tensor], tensors[piece.tensor]
        out[:, piece.columns.stop : piece.stop] = 0
        if piece.valid:
            known = _known((share > 0) & (top > torch.finfo(top.dtype).min))
            _write_slopes(out[:, piece.columns], rows[:, piece.columns], piece, targets, share, grad, criterion, known)


def _write_slopes(
    out: Tensor,
    rows: Tensor,
    piece: Piece,
    targets: Tensor,
    share: Tensor,
    grad: Tensor,
    criterion: Criterion,
    known: bool,
) -> None:
    """The gradient in the real columns of one logical shard, of which each row is ``known`` to have finite logits."""
    slope_target, slope_all = criterion.slopes
    compiling, lowest = torch.compiler.is_compiling(), torch.finfo(share.dtype).min
    owned, column = piece.locate(targets)
    at_target = (-slope_target * grad).masked_fill(~owned[:, None], 0)
    by_softmax = share[:, None] * grad
    for block in piece.blocks(rows):
        place, x = out[block], rows[block].to(share.dtype)
        x = x if known else x.clamp_min(lowest)
        direct = place.dtype == x.dtype and not compiling
        softmax = torch.softmax(x, -1, out=place) if direct else torch.softmax(x, -1)
        slope = softmax.mul_(by_softmax[block])
        if slope_all:
            slope.sub_(slope_all * grad[block])
        if compiling:  # Inductor would keep all slopes in float32 for a scatter
            here = torch.arange(piece.valid, device=rows.device) == column[block, None]
            slope = slope + torch.where(here, at_target[block], 0)
        else:
            slope.scatter_add_(-1, column[block, None], at_target[block])
        if not direct:
            place.copy_(slope)
