"""One training step: loss over micro-batches, a gradient norm that counts everything once, a schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from .distributed.collectives import all_gather, all_reduce
from .distributed.group import Group, group_or_single
from .distributed.reduction import tree_sum
from .modeling.parameters import Placement, is_fully_sharded, local_part, placements, sharding_groups, unwrapped

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepResult:
    """Mean loss in nats per token, and the gradient norm before clipping; both replicated scalars."""

    loss: Tensor
    grad_norm: Tensor


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    group: Group,
    max_norm: float = 1.0,
    dtype: torch.dtype = torch.float32,
    block_tokens: int | None = None,
) -> StepResult:
    """One optimizer step over ``batches`` of ``(ids, targets) [b, s]``, whose gradients are averaged.

    ``model`` is a Transformer, bare, in DistributedDataParallel or sharded by ``fully_shard``; then gradients are
    averaged over the data-parallel ranks too, with the last batch, and the loss is that of this rank's batches. With
    ``dtype`` bfloat16, matrix products run in bfloat16 (autocast) on float32 parameters. With ``block_tokens`` logits
    of so many tokens exist at a time (``vocab_parallel_linear_cross_entropy``).
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for left, (ids, targets) in zip(reversed(range(len(batches))), batches, strict=True):
        with _exchange_gradients(model, left == 0):
            loss = batch_loss(model, ids, targets, group=group, dtype=dtype, block_tokens=block_tokens) / len(batches)
            loss.backward()
        losses.append(loss.detach())
    norm = clip_grad_norm_(model, max_norm, group=group)
    optimizer.step()
    return StepResult(torch.stack(losses).sum(), norm)


def batch_loss(
    model: nn.Module,
    ids: Tensor,
    targets: Tensor,
    *,
    group: Group,
    dtype: torch.dtype = torch.float32,
    block_tokens: int | None = None,
) -> Tensor:
    """Mean cross-entropy of one batch, in nats per token, by a Transformer with or without wrappers.

    Raises ValueError when ``group`` is not like that of the model.
    """
    inner: Any = unwrapped(model)
    own, given = ((g.rank, g.world_size, g.num_shards) for g in (inner.group, group))
    if own != given:
        raise ValueError(f"the model was built for {inner.group}, not for {group}: pass the model's group")
    with _precision(ids.device, dtype):
        loss: Tensor = model(ids, targets=targets, block_tokens=block_tokens)
    return loss


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    group: Group,
    dtype: torch.dtype = torch.float32,
    block_tokens: int | None = None,
) -> float:
    """Mean cross-entropy over ``batches`` of equal size, in nats per token, by a Transformer with or without wrappers.

    Raises ValueError when there are no batches.
    """
    inner: Any = unwrapped(model)
    with inner.evaluating():
        options: dict[str, Any] = {"group": group, "dtype": dtype, "block_tokens": block_tokens}
        losses = [batch_loss(inner, ids, targets, **options).item() for ids, targets in batches]
    if not losses:
        raise ValueError("evaluate: no batches were given")
    return sum(losses) / len(losses)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, *, group: Group | None) -> Tensor:
    """Scale the gradients of ``model`` so that their norm over all ranks is at most ``max_norm``; return that norm.

    ``torch.nn.utils.clip_grad_norm_`` would give every rank a norm of its own. Here sharded gradients are summed over
    all logical shards, in the fixed tree, and replicated ones are counted once. One collective of V numbers, and one
    before it over each group of ranks among which ``fully_shard`` has cut parameters.

    Raises ValueError when ``max_norm`` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive; pass math.inf to measure without clipping")
    group = group_or_single(group)
    cuts: dict[tuple[ProcessGroup, ...], list[Placement]] = {}
    for place in placements(model, group=group):
        cuts.setdefault(sharding_groups(place.parameter), []).append(place)
    squares = sum(_squares(places, pgs, group) for pgs, places in cuts.items())
    *sharded, replicated = torch.as_tensor(squares).unbind(0)
    norm = (tree_sum(all_gather(torch.stack(sharded), group=group).unbind(0)) + replicated).sqrt()
    for places in cuts.values():  # torch scales several tensors at once, but not of several kinds
        nn.utils.clip_grads_with_norm_([place.parameter for place in places], max_norm, norm)
    return norm


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float, final: float = 0.1) -> float:
    """Learning rate of step 0, 1, ...: linear to ``peak`` over ``warmup`` steps, then a cosine to ``final * peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def _squares(places: Sequence[Placement], pgs: Iterable[ProcessGroup], group: Group) -> Tensor:
    """Sums of squares of gradients that are cut over ``pgs``: of each logical shard of this rank, then replicated."""
    counted: list[list[Tensor]] = [[] for _ in range(len(group.shards) + 1)]
    for place in places:
        grad = place.parameter.grad
        if grad is not None and place.dim is None:
            counted[-1].append(local_part(grad).tensor)
        elif grad is not None:
            for own, piece in zip(counted, place.counted(grad, group), strict=False):
                if piece is not None:
                    own.append(piece.contiguous())
    device = places[0].parameter.device
    total = torch.stack([_square_norm(grads, device) for grads in counted])
    for pg in pgs:
        total = all_reduce(total, group=Group(pg))
    return total


def _square_norm(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares in float32 or wider."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)


def _exchange_gradients(model: nn.Module, enabled: bool) -> AbstractContextManager[object]:
    """Whether backward passes inside exchange gradients among data-parallel ranks, or leave them to a later one."""
    if is_fully_sharded(model):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return nullcontext()


def _precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
