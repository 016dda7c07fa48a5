"""Cross-entropy on logits that are sharded over the vocabulary and never gathered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..cpu import empty_like
from ..distributed.collectives import all_gather
from ..distributed.group import Group, group_or_single
from ..distributed.reduction import tree_sum
from ..functional import wide
from ..kernels import lookup
from ..sharding import valid_size
from .checks import check_ids

Reduction = Literal["mean", "sum", "none"]

BLOCK_ELEMENTS = 2**18
"""Rows are taken in blocks of about this many logits: no wide copy of all logits ever exists."""


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    group: Group | None,
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
    of maximum, sum of exponentials and target logit, 12 bytes per token and logical shard (16 with label smoothing);
    an offset common to all logits costs no precision. Statistics are taken in float32 or wider, block by block, and
    the logits are not modified. z-loss: PaLM (Chowdhery et al. 2022).

    ``group=None`` means unsharded logits.

    Raises TypeError for targets that are not int32 or int64; ValueError for targets outside ``[0, vocab_size)``, for
    shapes that do not fit, ``label_smoothing`` outside [0, 1] and a negative ``z_loss``.
    """
    group = group_or_single(group)
    _check_shapes(logits, targets, group)
    vocab_size = logits.shape[-1] * group.world_size if vocab_size is None else vocab_size
    _check_options(logits.shape[-1] * group.world_size, vocab_size, label_smoothing, z_loss, reduction)
    check_ids("targets", targets, vocab_size, group.rank, ignore=ignore_index)

    rows, flat = logits.reshape(-1, logits.shape[-1]).contiguous(), targets.reshape(-1).long().to(logits.device)
    width = logits.shape[-1] // len(group.shards)
    pieces = [
        _Piece(shard * width, i * width, (i + 1) * width, valid_size(vocab_size, shard, width))
        for i, shard in enumerate(group.shards)
    ]
    with torch.no_grad():
        local = torch.stack([_statistics(rows, flat, piece, label_smoothing > 0) for piece in pieces])
        real = [n for n in (valid_size(vocab_size, j, width) for j in range(group.num_shards)) if n]
        top, log_sum, target_logit, *sums = _combine(all_gather(local, group=group), real)
        per_token = log_sum - (1 - label_smoothing) * (target_logit - top)
        if sums:
            per_token -= label_smoothing / vocab_size * sums[0]
        if z_loss:
            per_token += z_loss * (top + log_sum).square()
        kept = flat != ignore_index
        per_token = per_token.masked_fill(~kept, 0)
        shares = local[:, 1] * (local[:, 0] - top - log_sum).exp() * (1 + 2 * z_loss * (top + log_sum))
    slopes = (1 - label_smoothing, label_smoothing / vocab_size, z_loss)
    saved = (shares, top, log_sum, flat, kept)
    loss: Tensor = _Loss.apply(rows, per_token, saved, slopes, pieces)  # type: ignore[no-untyped-call]
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum()


@dataclass(frozen=True)
class _Piece:
    """One logical shard: its first vocabulary id, its columns in the local logits, and how many of them are real."""

    first: int
    start: int
    stop: int
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
    """``[3 or 4, n]``: maximum, sum of exponentials below it, target logit (0 if it lies elsewhere), and on request
    the sum of the logits below the maximum."""
    if kernel := lookup("cross_entropy_statistics", rows, targets):
        found: Tensor = kernel(rows, targets, piece, with_sum)
        return found
    out = rows.new_zeros(4 if with_sum else 3, len(rows), dtype=wide(rows.dtype))
    if piece.valid == 0:
        return out
    owned, column = piece.locate(targets)
    for block in piece.blocks(len(rows)):
        x = rows[block, piece.columns].to(out.dtype)
        finite = _finite(x)
        out[0, block] = finite.amax(-1)
        out[1, block] = torch.softmax(finite, -1).amax(-1).reciprocal()  # the largest is exp(0) over the sum
        out[2, block] = x.gather(-1, column[block, None]).squeeze(-1).masked_fill(~owned[block], 0)
        if with_sum:
            out[3, block] = (x - out[0, block, None]).sum(-1)
    return out


def _finite(x: Tensor) -> Tensor:
    """``x`` with logits of -inf, of which a row may have no others, as small as they can be."""
    return x.clamp_min(torch.finfo(x.dtype).min)


def _combine(statistics: Tensor, real: list[int]) -> list[Tensor]:
    """``[V, k, n] -> k`` tensors ``[n]``: maximum, log of the sum below it, target logit, sum of logits below it.

    ``real`` has the number of real columns of each logical shard that has any; sums follow the fixed tree.
    """
    tops, exps, targets, *sums = statistics[: len(real)].unbind(1)
    top = tops.amax(0)
    shift = tops - top
    log_sum = tree_sum((exps * shift.exp()).unbind(0)).log()
    below = [tree_sum([s + n * d for s, n, d in zip(sums[0], real, shift, strict=True)])] if sums else []
    return [top, log_sum, tree_sum(targets.unbind(0)), *below]


class _Loss(torch.autograd.Function):
    """Gives ``per_token`` its gradient in the logits, recomputed from them block by block.

    d per_token = (1 + 2 z lse) * softmax - slope_target * onehot(target) - slope_sum

    ``shares [pieces, n]`` has the first factor and what turns a softmax within a piece into that over all logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        per_token: Tensor,
        saved: tuple[Tensor, ...],
        slopes: tuple[float, float, float],
        pieces: list[_Piece],
    ) -> Tensor:
        ctx.save_for_backward(rows, *saved)
        ctx.slopes, ctx.pieces = slopes, pieces
        return per_token.view_as(per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, shares, top, log_sum, targets, kept = ctx.saved_tensors
        slope_target, slope_sum, z_loss = ctx.slopes
        grad = grad.masked_fill(~kept, 0)[:, None]
        out = empty_like(rows)
        if kernel := lookup("cross_entropy_gradient", rows, targets):
            top, log_sum = top[:, None], log_sum[:, None]
            by_lse = grad * (1 + 2 * z_loss * (top + log_sum))
            vectors = (top, log_sum), (by_lse, slope_target * grad, slope_sum * grad)
            for piece in ctx.pieces:
                kernel(out, rows, targets, piece, *vectors)
            return out, None, None, None, None
        for piece, share in zip(ctx.pieces, shares, strict=True):
            out[:, piece.columns.stop : piece.stop] = 0
            if piece.valid == 0:
                continue
            owned, column = piece.locate(targets)
            at_target = (-slope_target * grad).masked_fill(~owned[:, None], 0)
            by_softmax = share[:, None] * grad
            for block in piece.blocks(len(rows)):
                softmax = torch.softmax(_finite(rows[block, piece.columns].to(share.dtype)), -1)
                slope = softmax.mul_(by_softmax[block])
                if slope_sum:
                    slope.sub_(slope_sum * grad[block])
                out[block, piece.columns] = slope.scatter_add_(-1, column[block, None], at_target[block])
        return out, None, None, None, None


def _check_shapes(logits: Tensor, targets: Tensor, group: Group) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point, not {logits.dtype}")
    if logits.dim() == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets {list(targets.shape)} must have the leading shape of logits {list(logits.shape)}")
    if logits.shape[-1] % len(group.shards):
        raise ValueError(f"{logits.shape[-1]} local columns do not divide into {len(group.shards)} logical shards")


def _check_options(columns: int, vocab_size: int, label_smoothing: float, z_loss: float, reduction: str) -> None:
    if not 0 < vocab_size <= columns:
        raise ValueError(f"vocab_size={vocab_size} does not fit the {columns} columns that the ranks hold together")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1]")
    if z_loss < 0:
        raise ValueError(f"z_loss={z_loss} must not be negative")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction={reduction!r} is not "mean", "sum" or "none"')
