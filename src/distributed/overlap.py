"""Collectives that run while matrix products are computed. Beside ``regions``, where autograd meets communication.

    multiply_copies   forward: products              backward: dx = sum of dy W; its all_reduce runs during dW = dy^T x
    multiply_reduce   forward: products by chunks    backward: products
                      of tokens, the all_reduce of one during the product of the next

The first has the bits of ``copy_to_shards`` (or ``gather_to_shards``) followed by products, whatever the order of sums.
The second has not, for a kernel may take another path for fewer rows: it is for sums in the backend's order alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .collectives import all_gather, start_all_reduce, start_reduce_scatter
from .group import Group
from .reduction import tree_sum

CHUNKS = 4
"""Into how many chunks ``multiply_reduce`` cuts the tokens."""


@dataclass(frozen=True)
class Product:
    """A linear map and its gradients, as plain functions.

    ``forward(x [..., in], weight [out, in], bias [out] or None) -> [..., out]``,
    ``input_grad(grad [n, out], weight) -> [n, in]``, ``weight_grad(grad [n, out], x [n, in]) -> [out, in]``.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    input_grad: Callable[[Tensor, Tensor], Tensor]
    weight_grad: Callable[[Tensor, Tensor], Tensor]


class _MultiplyCopies(torch.autograd.Function):
    """``parameters`` are all weights, then all biases; those of one layer are neighbours, one per logical shard."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, product: Product, sequence: bool, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.product, ctx.sequence, ctx.dtype = group, product, sequence, x.dtype
        ctx.set_materialize_grads(False)
        weights: Any = parameters[: len(parameters) // 2]
        whole = (all_gather(x, group=group, dim=1) if sequence else x).to(weights[0].dtype)
        ctx.save_for_backward(whole, *weights)
        biases = parameters[len(weights) :]
        return tuple(product.forward(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        total = _input_grad(ctx, x, weights, flat)
        if ctx.sequence:
            finish = start_reduce_scatter(total, group=ctx.group, dim=1)
        else:
            finish = start_all_reduce(total, group=ctx.group)
        asked = iter(ctx.needs_input_grad[4:])
        weight_grads = [ctx.product.weight_grad(g, rows) if next(asked) and g is not None else None for g in flat]
        bias_grads = [g.sum(0) if next(asked) and g is not None else None for g in flat]
        return (finish(), None, None, None, *weight_grads, *bias_grads)


def _input_grad(ctx: Any, x: Tensor, weights: list[Tensor], grads: list[Tensor | None]) -> Tensor:
    """The sum over layers, last one first as autograd takes it, of each logical shard; then over shards in the tree."""
    shards, terms = len(ctx.group.shards), []
    for shard in range(shards):
        total: Tensor | None = None
        for weight, grad in reversed(list(zip(weights, grads, strict=True))[shard::shards]):
            if grad is not None:
                term = ctx.product.input_grad(grad, weight).to(ctx.dtype)
                total = term if total is None else total.add_(term)
        terms.append(x.new_zeros(x.shape, dtype=ctx.dtype) if total is None else total.view(x.shape))
    return tree_sum(terms)


class _MultiplyReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Group, product: Product) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(x, weight)
        chunks = x.reshape(-1, x.shape[-1]).chunk(CHUNKS)
        running = [start_all_reduce(product.forward(rows, weight, None), group=group) for rows in chunks]
        return torch.cat([finish() for finish in running])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, needs = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        x_grad = ctx.product.input_grad(rows, weight).view(x.shape) if needs[0] else None
        weight_grad = ctx.product.weight_grad(rows, x.reshape(-1, x.shape[-1])) if needs[1] else None
        return x_grad, weight_grad, None, None


def multiply_copies(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    group: Group,
    product: Product,
    sequence_parallel: bool = False,
) -> Sequence[Tensor]:
    """Replicated ``x [..., in]`` times each weight ``[out, in]``, plus its bias: ``[..., out]`` each.

    Of every layer in turn come as many weights as this rank has logical shards. With ``sequence_parallel`` x is this
    rank's part of the sequence ``[b, s/w, in]``. The gradient of x is summed over layers and all V shards, each rank
    getting all of it, or that of its part.
    """
    products: Sequence[Tensor] = _MultiplyCopies.apply(  # type: ignore[no-untyped-call]
        x, group, product, sequence_parallel, *weights, *biases
    )
    return products


def multiply_reduce(x: Tensor, weight: Tensor, *, group: Group, product: Product) -> Tensor:
    """``x [..., in/w]`` times ``weight [out, in/w]``, summed over ranks in the backend's order: ``[..., out]``."""
    rows: Tensor = _MultiplyReduce.apply(x, weight, group, product)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], weight.shape[0])
