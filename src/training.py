"""One training step: loss over micro-batches, a gradient norm that counts everything once, a schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed.collectives import all_gather
from .distributed.group import Group, group_or_single
from .distributed.reduction import tree_sum
from .modeling import Transformer, vocab_parallel_cross_entropy
from .modeling.parameters import placements

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepResult:
    """Mean loss in nats per token, and the gradient norm before clipping; both replicated scalars."""

    loss: Tensor
    grad_norm: Tensor


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    group: Group,
    max_norm: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> StepResult:
    """One optimizer step over ``batches`` of ``(ids, targets) [b, s]``, whose gradients are averaged.

    With ``dtype`` bfloat16, matrix products run in bfloat16 (autocast) on float32 parameters.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for ids, targets in batches:
        loss = batch_loss(model, ids, targets, group=group, dtype=dtype) / len(batches)
        loss.backward()
        losses.append(loss.detach())
    norm = clip_grad_norm_(model, max_norm, group=group)
    optimizer.step()
    return StepResult(torch.stack(losses).sum(), norm)


def batch_loss(
    model: Transformer, ids: Tensor, targets: Tensor, *, group: Group, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Mean cross-entropy of one batch, in nats per token."""
    with _precision(ids.device, dtype):
        logits = model(ids)
    return vocab_parallel_cross_entropy(logits, targets, group=group, vocab_size=model.args.vocab_size)


def evaluate(
    model: Transformer, batches: Iterable[Batch], *, group: Group, dtype: torch.dtype = torch.float32
) -> float:
    """Mean cross-entropy over ``batches`` of equal size, in nats per token.

    Raises ValueError when there are no batches.
    """
    with model.evaluating():
        losses = [batch_loss(model, ids, targets, group=group, dtype=dtype).item() for ids, targets in batches]
    if not losses:
        raise ValueError("evaluate: no batches were given")
    return sum(losses) / len(losses)


@torch.no_grad()
def clip_grad_norm_(model: torch.nn.Module, max_norm: float, *, group: Group | None) -> Tensor:
    """Scale the gradients of ``model`` so that their norm over all ranks is at most ``max_norm``; return that norm.

    ``torch.nn.utils.clip_grad_norm_`` would give every rank a norm of its own. Here sharded gradients are summed over
    all logical shards, in the fixed tree, and replicated ones are counted once. One collective of V numbers.

    Raises ValueError when ``max_norm`` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive; pass math.inf to measure without clipping")
    group = group_or_single(group)
    sharded: list[list[Tensor]] = [[] for _ in group.shards]
    replicated: list[Tensor] = []
    for place in placements(model, group=group):
        grad = place.parameter.grad
        if grad is not None and place.dim is None:
            replicated.append(grad)
        elif grad is not None and place.dim is not None:
            for own, piece in zip(sharded, place.counted(grad, group), strict=True):
                if piece is not None:
                    own.append(piece.contiguous())
    device = next(model.parameters()).device
    local = torch.stack([_square_norm(grads, device) for grads in sharded])
    squares = tree_sum(all_gather(local, group=group).unbind(0)) + _square_norm(replicated, device)
    norm = squares.sqrt()
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float, final: float = 0.1) -> float:
    """Learning rate of step 0, 1, ...: linear to ``peak`` over ``warmup`` steps, then a cosine to ``final * peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def _square_norm(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares in float32 or wider."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)


def _precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
