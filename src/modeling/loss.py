"""Cross-entropy on logits that are sharded over the vocabulary and never gathered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..distributed.collectives import all_gather
from ..distributed.group import Group
from ..distributed.reduction import tree_sum
from ..functional import wide
from ..sharding import valid_size
from .checks import check_ids

Reduction = Literal["mean", "sum", "none"]

BLOCK_ELEMENTS = 2**18
"""Rows are taken in blocks of about this many logits: no wide copy of all logits ever exists."""


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    group: Group,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of ``logits [..., v/w]`` (this rank's slice) and replicated ``targets [...]``, in nats.

        lse  = log(sum_v exp(logits))
        loss = lse - (1 - label_smoothing) * logits[target] - label_smoothing * mean_v(logits) + z_loss * lse^2

    ``vocab_size`` is the number of real columns when the vocabulary is padded. ``reduction`` and ``ignore_index`` mean
    what they mean in ``F.cross_entropy``; the result, replicated, is in float32 or wider. One collective: an all-gather
    of log-sum-exp and target logit, 8 bytes per token and logical shard (12 with label smoothing). Statistics are
    taken in float32 or wider, block by block, and the logits are not modified. z-loss: PaLM (Chowdhery et al. 2022).

    Raises TypeError for targets that are not int32 or int64; ValueError for targets outside ``[0, vocab_size)``, for
    shapes that do not fit, and for ``label_smoothing`` outside [0, 1].
    """
    vocab_size = logits.shape[-1] * group.world_size if vocab_size is None else vocab_size
    _check(logits, targets, group, vocab_size, label_smoothing, reduction)
    check_ids("targets", targets, vocab_size, group.rank, ignore=ignore_index)

    rows, flat = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long().to(logits.device)
    width = logits.shape[-1] // len(group.shards)
    pieces = [
        _Piece(first=shard * width, start=i * width, valid=valid_size(vocab_size, shard, width))
        for i, shard in enumerate(group.shards)
    ]
    with torch.no_grad():
        local = torch.stack([_statistics(rows, flat, piece, label_smoothing > 0) for piece in pieces])
        lse, target_logit, *sums = _combine(all_gather(local, group=group))
        per_token = lse - (1 - label_smoothing) * target_logit + z_loss * lse.square()
        if sums:
            per_token -= label_smoothing / vocab_size * sums[0]
        kept = flat != ignore_index
        per_token = per_token.masked_fill(~kept, 0)
    slopes = (1 - label_smoothing, label_smoothing / vocab_size, z_loss)
    loss: Tensor = _Loss.apply(rows, per_token, lse, flat, kept, slopes, pieces)  # type: ignore[no-untyped-call]
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum()


@dataclass(frozen=True)
class _Piece:
    """One logical shard: its first vocabulary id, where its columns start in the local logits, how many are real."""

    first: int
    start: int
    valid: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.valid)

    def blocks(self, num_rows: int) -> list[slice]:
        """Runs of rows, cut the same way at every world size."""
        height = max(1, BLOCK_ELEMENTS // max(self.valid, 1))
        return [slice(i, min(i + height, num_rows)) for i in range(0, num_rows, height)]

    def locate(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """``targets [n]`` -> whether each lies here, and its column (0 where it does not)."""
        column = targets - self.first
        owned = (column >= 0) & (column < self.valid)
        return owned, torch.where(owned, column, 0)


def _statistics(rows: Tensor, targets: Tensor, piece: _Piece, with_sum: bool) -> Tensor:
    """Log-sum-exp, target logit (0 if it lies elsewhere) and, on request, sum of the logits: ``[2 or 3, n]``."""
    out = rows.new_zeros(3 if with_sum else 2, len(rows), dtype=wide(rows.dtype))
    if piece.valid == 0:
        out[0] = -math.inf
        return out
    owned, column = piece.locate(targets)
    for block in piece.blocks(len(rows)):
        x = rows[block, piece.columns].to(out.dtype).contiguous()
        out[0, block] = x.logsumexp(-1)
        out[1, block] = x.gather(-1, column[block, None]).squeeze(-1).masked_fill(~owned[block], 0)
        if with_sum:
            out[2, block] = x.sum(-1)
    return out


def _combine(statistics: Tensor) -> list[Tensor]:
    """``[V, k, n] -> k`` tensors ``[n]``: log-sum-exps are combined, the others summed, in the fixed tree."""
    lse, *others = statistics.unbind(1)
    top = lse.amax(0)
    top = top.masked_fill(top.isinf(), 0)
    total = tree_sum((lse - top).exp().unbind(0)).log() + top
    return [total, *[tree_sum(terms.unbind(0)) for terms in others]]


class _Loss(torch.autograd.Function):
    """Gives ``per_token`` its gradient in the logits, recomputed from them block by block.

    d per_token = (1 + 2 z lse) * softmax - slope_target * onehot(target) - slope_sum
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        per_token: Tensor,
        lse: Tensor,
        targets: Tensor,
        kept: Tensor,
        slopes: tuple[float, float, float],
        pieces: list[_Piece],
    ) -> Tensor:
        ctx.save_for_backward(rows, lse, targets, kept)
        ctx.slopes, ctx.pieces = slopes, pieces
        return per_token.view_as(per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, lse, targets, kept = ctx.saved_tensors
        slope_target, slope_sum, z_loss = ctx.slopes
        grad = grad.masked_fill(~kept, 0)[:, None]
        lse = lse[:, None]
        by_lse = grad * (1 + 2 * z_loss * lse)
        out = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        for piece in ctx.pieces:
            owned, column = piece.locate(targets)
            at_target = (-slope_target * grad).masked_fill(~owned[:, None], 0)
            for block in piece.blocks(len(rows)):
                softmax = (rows[block, piece.columns].to(lse.dtype) - lse[block]).exp_()
                slope = softmax.mul_(by_lse[block]).sub_(slope_sum * grad[block])
                if piece.valid:
                    out[block, piece.columns] = slope.scatter_add_(-1, column[block, None], at_target[block])
        return out, None, None, None, None, None, None


def _check(
    logits: Tensor, targets: Tensor, group: Group, vocab_size: int, label_smoothing: float, reduction: str
) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point, not {logits.dtype}")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets {list(targets.shape)} must have the leading shape of logits {list(logits.shape)}")
    if logits.shape[-1] % len(group.shards):
        raise ValueError(f"{logits.shape[-1]} local columns do not divide into {len(group.shards)} logical shards")
    columns = logits.shape[-1] * group.world_size
    if not 0 < vocab_size <= columns:
        raise ValueError(f"vocab_size={vocab_size} does not fit the {columns} columns that the ranks hold together")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1]")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction={reduction!r} is not "mean", "sum" or "none"')
