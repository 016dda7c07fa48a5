"""Cross-entropy on logits that are sharded over the vocabulary and never gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from ..distributed.group import Group, group_or_single
from ..memory import empty_like
from .checks import check_ids
from .loss_terms import Criterion, Piece, Reduction, statistics, token_losses, write_gradients


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
    inplace_backward: bool = False,
) -> Tensor:
    """Cross-entropy of ``logits [..., v/w]`` (this rank's slice) and replicated ``targets [...]``, in nats.

        lse  = log(sum_v exp(logits))
        loss = lse - (1 - label_smoothing) * logits[target] - label_smoothing * mean_v(logits) + z_loss * lse^2

    ``vocab_size`` is the number of real columns when the vocabulary is padded. ``reduction`` and ``ignore_index`` mean
    what they mean in ``F.cross_entropy``; the result, replicated, is in float32 or wider. One collective: an all-gather
    of 8 bytes per token and logical shard, 12 with label smoothing: a logit (the target's where the shard has it, else
    the largest) and the log-sum-exp above it. An offset common to all logits costs no precision. Statistics are taken
    in float32 or wider, block by block, and the logits are not modified. z-loss: PaLM (Chowdhery et al. 2022).

    ``inplace_backward`` lets backward write the gradient, of the same bits, over the logits: they are destroyed then,
    and no second tensor of their size is made. RuntimeError where a second backward, or that of another operation which
    saved them, would need them. It is for logits that nobody looks at afterwards; compiled graphs, which plan their
    memory themselves, ignore it.

    ``group=None`` means unsharded logits.

    Raises TypeError for targets that are not int32 or int64; ValueError for targets outside ``[0, vocab_size)``, for
    shapes that do not fit, ``label_smoothing`` outside [0, 1], a negative ``z_loss``, and ``inplace_backward`` on
    logits that live in a leaf.
    """
    group = group_or_single(group)
    _check_shapes(logits, targets, group)
    columns = logits.shape[-1] * group.world_size
    vocab_size = columns if vocab_size is None else vocab_size
    criterion = Criterion(vocab_size, ignore_index, label_smoothing, z_loss, reduction)
    check_targets(targets, columns, group, criterion)
    if inplace_backward:
        _check_outside_leaves(logits)
    rows = logits.reshape(-1, logits.shape[-1]).contiguous()
    width = rows.shape[1] // len(group.shards)
    pieces = [Piece.of(shard, width, vocab_size, start=i * width) for i, shard in enumerate(group.shards)]
    return cross_entropy([rows], targets, pieces, group, criterion, inplace_backward)


def cross_entropy(
    tensors: Sequence[Tensor],
    targets: Tensor,
    pieces: Sequence[Piece],
    group: Group,
    criterion: Criterion,
    inplace: bool,
) -> Tensor:
    """The same of ``tensors [n, columns]``, in which the ``pieces`` lie that this rank has, after all checks."""
    flat = targets.reshape(-1).long().to(tensors[0].device)
    with torch.no_grad():
        local = torch.stack([statistics(tensors[piece.tensor], flat, piece, criterion) for piece in pieces])
        per_token, saved = token_losses(local, flat, pieces[0].width, group, criterion)
    inplace = inplace and not torch.compiler.is_compiling()
    loss = _Loss.apply(per_token, saved, criterion, pieces, inplace, *tensors)  # type: ignore[no-untyped-call]
    return criterion.reduce(loss, saved[-1], targets.shape)


class _Loss(torch.autograd.Function):
    """Gives ``per_token`` its gradient in the logits, recomputed from them block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        per_token: Tensor,
        saved: tuple[Tensor, ...],
        criterion: Criterion,
        pieces: Sequence[Piece],
        inplace: bool,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*saved, *tensors)
        ctx.criterion, ctx.pieces, ctx.inplace, ctx.spent = criterion, pieces, inplace, False
        ctx.num_saved = len(saved)
        return per_token.clone()  # a view could not be modified in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "a second backward through a cross-entropy whose logits hold their gradient, "
                "as with inplace_backward=True, or with head and loss in one"
            )
        found = ctx.saved_tensors  # recomputation gives them once
        saved, tensors = found[: ctx.num_saved], found[ctx.num_saved :]
        if not ctx.inplace:
            grads = [empty_like(rows) for rows in tensors]
            write_gradients(grads, tensors, ctx.pieces, saved, grad, ctx.criterion)
            return None, None, None, None, None, *grads
        write_gradients(tensors, tensors, ctx.pieces, saved, grad, ctx.criterion)
        increment_version(tensors)  # kernels write unseen
        ctx.spent = True
        return None, None, None, None, None, *(rows.detach() for rows in tensors)


def check_targets(targets: Tensor, columns: int, group: Group, criterion: Criterion) -> None:
    """Raise unless ``targets`` are ids of a vocabulary that fits the ``columns`` of all ranks together."""
    if not 0 < criterion.vocab_size <= columns:
        size = criterion.vocab_size
        raise ValueError(f"vocab_size={size} does not fit the {columns} columns that the ranks hold together")
    check_ids("targets", targets, criterion.vocab_size, group.rank, ignore=criterion.ignore_index)


def _check_outside_leaves(logits: Tensor) -> None:
    """A leaf has values that its owner goes on using, and is no place for its own gradient."""
    owner = logits if logits._base is None else logits._base
    if logits.requires_grad and owner.is_leaf:
        raise ValueError(
            "inplace_backward=True would write the gradient over a leaf, or a view of one; "
            "pass logits that an operation has made, or leave it out"
        )


def _check_shapes(logits: Tensor, targets: Tensor, group: Group) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point, not {logits.dtype}")
    if logits.dim() == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets {list(targets.shape)} must have the leading shape of logits {list(logits.shape)}")
    if logits.shape[-1] % len(group.shards):
        raise ValueError(f"{logits.shape[-1]} local columns do not divide into {len(group.shards)} logical shards")
