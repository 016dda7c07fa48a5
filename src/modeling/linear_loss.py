"""The language-model head and its cross-entropy in one: logits exist as long as they are needed, and no copies of them.

Legend: n tokens, h = hidden_size, V = num_shards, hidden [..., h] replicated, weight [v/w, h], targets [...].

Without ``block_tokens`` a rank's logits are made once, each logical shard in a tensor of its own, and backward writes
their gradient over them: three products, the bits of head and loss apart. With it they are made block by block of
tokens, and made again in backward: four products, for memory of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..distributed.group import Group, group_or_single
from ..distributed.regions import copy_to_shards, split_shards
from ..functional import autocast_dtype, linear, wide
from ..memory import empty_like
from .checks import check_activations
from .loss import check_targets, cross_entropy
from .loss_terms import Criterion, Piece, Reduction, statistics, token_losses, write_gradients


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: Group | None,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    block_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy of the logits ``hidden W^T + bias``, which nobody else sees, in nats.

    ``hidden [..., h]`` and ``targets [...]`` are replicated; ``weight [v/w, h]`` and ``bias [v/w]`` are this rank's
    slices. The gradient of hidden is summed over all logical shards. The other options, and the bits, are those of
    ``vocab_parallel_cross_entropy``; so is what is sent forward, and backward sends an all-reduce of hidden's gradient.

    A rank holds its logits once: their gradient is written over them, and a second backward raises RuntimeError. With
    ``block_tokens`` it holds those of so many tokens and computes them again in each backward (where there are no more
    tokens than that, nothing changes); sums over tokens in the gradients of weight and bias are then taken block by
    block, in float32 or wider, which rounds them in another way, the same at every world size. Under torch.compile this
    runs between two graphs, which is an error with ``fullgraph=True``.

    ``group=None`` means an unsharded weight.

    Raises TypeError and ValueError as ``vocab_parallel_cross_entropy`` does; ValueError for ``block_tokens`` below 1.
    """
    group = group_or_single(group)
    check_activations(hidden, weight.shape[1], "vocab_parallel_linear_cross_entropy")
    vocab_size = weight.shape[0] * group.world_size if vocab_size is None else vocab_size
    criterion = Criterion(vocab_size, ignore_index, label_smoothing, z_loss, reduction)
    biases = [None] * len(group.shards) if bias is None else group.split(bias)
    shards = copy_to_shards(hidden, group=group), split_shards(weight, group=group, dim=0), biases
    return linear_cross_entropy(*shards, targets, group, criterion, block_tokens)


def linear_cross_entropy(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    targets: Tensor,
    group: Group,
    criterion: Criterion,
    block_tokens: int | None = None,
) -> Tensor:
    """The same of one input ``[..., h]``, weight ``[v/V, h]`` and bias for each logical shard of this rank."""
    if block_tokens is not None and block_tokens < 1:
        raise ValueError(f"block_tokens={block_tokens} must be at least 1")
    if block_tokens is None or targets.numel() <= block_tokens:
        return logits_cross_entropy(list(map(linear, inputs, weights, biases)), targets, group, criterion)
    blocked = _blocked_cross_entropy
    if torch.compiler.is_compiling():  # a graph would keep the logits of all blocks for its backward
        blocked = torch.compiler.disable(blocked, reason="block_tokens cannot be part of a graph")
    return blocked(inputs, weights, biases, targets, group, criterion, block_tokens)


def _blocked_cross_entropy(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    targets: Tensor,
    group: Group,
    criterion: Criterion,
    block_tokens: int,
) -> Tensor:
    """As ``linear_cross_entropy``, with the logits of so many tokens at a time."""
    width = weights[0].shape[0]
    pieces = _pieces(inputs[0], targets, width, group, criterion)
    rows = [x.reshape(-1, x.shape[-1]) for x in inputs]
    flat = targets.reshape(-1).long().to(rows[0].device)
    blocks = [slice(i, i + block_tokens) for i in range(0, len(flat), block_tokens)]
    plan = _Plan(criterion, pieces, blocks, _product_dtype(rows[0], weights[0]))
    with torch.no_grad():
        shards = zip(pieces, rows, weights, biases, strict=True)
        local = torch.stack([_statistics(*shard, flat, plan) for shard in shards])
        per_token, saved = token_losses(local, flat, width, group, criterion)
    loss = _Blocked.apply(per_token, saved, plan, *rows, *weights, *biases)  # type: ignore[no-untyped-call]
    return criterion.reduce(loss, saved[-1], targets.shape)


def logits_cross_entropy(logits: Sequence[Tensor], targets: Tensor, group: Group, criterion: Criterion) -> Tensor:
    """Cross-entropy of one ``[..., v/V]`` for each logical shard of this rank, which backward overwrites."""
    width = logits[0].shape[-1]
    pieces = _pieces(logits[0], targets, width, group, criterion)
    pieces = [replace(piece, tensor=i) for i, piece in enumerate(pieces)]
    return cross_entropy([y.reshape(-1, width) for y in logits], targets, pieces, group, criterion, inplace=True)


def _pieces(x: Tensor, targets: Tensor, width: int, group: Group, criterion: Criterion) -> list[Piece]:
    """The logical shards of this rank, for ``targets`` that fit ``x [..., any]``."""
    if targets.shape != x.shape[:-1]:
        shape = list(x.shape[:-1])
        raise ValueError(f"targets {list(targets.shape)} must have the leading shape {shape} of hidden")
    check_targets(targets, width * group.num_shards, group, criterion)
    return [Piece.of(shard, width, criterion.vocab_size) for shard in group.shards]


@dataclass(frozen=True)
class _Plan:
    """What is computed, of which logical shards, in which runs of tokens, in which dtype the products."""

    criterion: Criterion
    pieces: list[Piece]
    blocks: list[slice]
    dtype: torch.dtype

    def cast(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Once, where autocast would do it for every block."""
        return weight.to(self.dtype), None if bias is None else bias.to(self.dtype)


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """In which ``linear`` takes its product."""
    cast = autocast_dtype(x.device)
    return weight.dtype if cast is None or x.dtype == torch.float64 else cast


def _statistics(piece: Piece, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: _Plan) -> Tensor:
    """Those of one logical shard, ``[3 or 4, n]``, with the logits of one block at a time."""
    weight, bias = plan.cast(weight, bias)
    found = [statistics(linear(x[block], weight, bias), targets[block], piece, plan.criterion) for block in plan.blocks]
    return torch.cat(found, -1)


class _Blocked(torch.autograd.Function):
    """Gives ``per_token`` its gradient in the rows, weights and biases of the logical shards: with dl of the logits,

    drows = dl W,   dW = dl^T rows,   dbias = sum(dl)
    """

    @staticmethod
    def forward(
        ctx: Any, per_token: Tensor, saved: tuple[Tensor, ...], plan: _Plan, *operands: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*saved, *operands)
        ctx.plan = plan
        return per_token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        count, found = len(plan.pieces), ctx.saved_tensors
        saved, operands = found[: -3 * count], found[-3 * count :]
        with torch.autocast(grad.device.type, enabled=False):
            grads = [
                _gradients(i, operands[i::count], ctx.needs_input_grad[3 + i :: count], saved, grad, plan)
                for i in range(count)
            ]
        return None, None, None, *(grad for column in zip(*grads, strict=True) for grad in column)


def _gradients(
    number: int,
    operands: tuple[Tensor, Tensor, Tensor | None],
    wanted: Sequence[bool],
    saved: Sequence[Tensor],
    grad: Tensor,
    plan: _Plan,
) -> tuple[Tensor | None, ...]:
    """Those of rows, weight and bias of logical shard ``number`` of this rank, as far as they are ``wanted``."""
    piece, (x, weight, bias), (local, *vectors) = plan.pieces[number], operands, saved
    narrow, narrow_bias = plan.cast(weight, bias)
    x_grad = empty_like(x) if wanted[0] else None
    weight_grad = torch.zeros_like(weight, dtype=wide(weight.dtype)) if wanted[1] else None
    bias_grad = torch.zeros_like(bias, dtype=wide(bias.dtype)) if bias is not None and wanted[2] else None
    for block in plan.blocks:
        part = x[block].to(plan.dtype)
        terms = [local[number : number + 1, :, block], *(vector[block] for vector in vectors)]
        slope = linear(part, narrow, narrow_bias)
        write_gradients([slope], [slope], [piece], terms, grad[block], plan.criterion)
        if x_grad is not None:
            x_grad[block] = linear(slope, narrow.t())
        if weight_grad is not None:
            _add_product(weight_grad, slope, part)
        if bias_grad is not None:
            bias_grad += slope.sum(0, dtype=bias_grad.dtype)
        del slope  # before the next block makes its own
    return x_grad, weight_grad, bias_grad


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a^T b``, without a second tensor of that size where the dtypes agree."""
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b)
    else:
        total += linear(a.t(), b.t())
