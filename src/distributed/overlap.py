"""Collectives that run while matrix products are computed. Beside ``regions``, where autograd meets communication.

    EarlySum          forward: products              backward: dx = sum of dy W; its all_reduce runs during dW = dy^T x
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


@dataclass(frozen=True)
class Prepared:
    """A layer's weights ``[out, in]`` and biases ``[out]``, one of each per logical shard, for an ``EarlySum``.

    ``late`` are the same for autograd alone, ``left`` what their gradients will be computed of.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    late: Sequence[Tensor | None]
    left: list[Any]


class EarlySum:
    """Copies of ``x`` to multiply, one layer after another, whose gradients are summed before those of the weights.

    Autograd runs the nodes that it can in the reverse order of their making: those of ``multiply`` hand the gradient of
    x on and leave what the weights need to ``_Late``; when all did, ``_Start`` sums over shards and starts the
    collective; the nodes of ``_Late``, which are older, compute the gradients of weights; ``_Finish`` waits. Another
    order, as that of a layer which is prepared after the first was multiplied, only costs time.
    """

    def __init__(self, x: Tensor, *, group: Group, product: Product, sequence_parallel: bool) -> None:
        self._group, self._product, self._sequence = group, product, sequence_parallel
        self._running: list[Callable[[], Tensor]] = []
        self._entered = _Finish.apply(x, self._running)  # type: ignore[no-untyped-call]
        self._wholes: dict[torch.dtype, Tensor] = {}

    def prepare(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Prepared:
        """A layer that may be multiplied, once; the best time is before ``start``."""
        left: list[Any] = []
        late = _Late.apply(left, self._product, *weights, *biases)  # type: ignore[no-untyped-call]
        return Prepared(weights, biases, late, left)

    def start(self) -> Sequence[Tensor]:
        """The whole x, once per logical shard of this rank. To be called once, before ``multiply``."""
        place = self._group, self._sequence, self._running
        copies: Sequence[Tensor] = _Start.apply(self._entered, *place)  # type: ignore[no-untyped-call]
        self._copies = copies
        return copies

    def multiply(self, layer: Prepared, dtype: torch.dtype) -> list[Tensor]:
        """``x W^T + b`` in ``dtype``, of each logical shard of this rank: ``[..., out]`` each."""
        if dtype not in self._wholes:
            self._wholes[dtype] = self._copies[0].detach().to(dtype)
        weights = [weight.detach().to(dtype) for weight in layer.weights]
        biases = [None if bias is None else bias.detach().to(dtype) for bias in layer.biases]
        values = self._wholes[dtype], weights, biases
        return list(
            _Multiply.apply(values, layer.left, self._product, *self._copies, *layer.late)  # type: ignore[no-untyped-call]
        )


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, running: list[Callable[[], Tensor]]) -> Tensor:
        ctx.running = running
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> tuple[Tensor, None]:
        return ctx.running.pop()(), None


class _Late(torch.autograd.Function):
    """``parameters`` are a layer's weights, then its biases, one of each per logical shard."""

    @staticmethod
    def forward(ctx: Any, left: list[Any], product: Product, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.left, ctx.product = left, product
        ctx.set_materialize_grads(False)
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: None) -> tuple[Tensor | None, ...]:
        grads, rows = ctx.left.pop()
        asked = iter(ctx.needs_input_grad[2:])
        weight_grads = [ctx.product.weight_grad(g, rows) if next(asked) and g is not None else None for g in grads]
        bias_grads = [g.sum(0) if next(asked) and g is not None else None for g in grads]
        return (None, None, *weight_grads, *bias_grads)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sequence: bool, running: list[Any]) -> tuple[Tensor, ...]:
        ctx.group, ctx.sequence, ctx.running = group, sequence, running
        whole = all_gather(x, group=group, dim=1) if sequence else x
        return tuple(whole.view_as(whole) for _ in group.shards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        total = tree_sum(grads)
        if ctx.sequence:
            ctx.running.append(start_reduce_scatter(total, group=ctx.group, dim=1))
        else:
            ctx.running.append(start_all_reduce(total, group=ctx.group))
        return None, None, None, None


class _Multiply(torch.autograd.Function):
    """``values`` are the numbers, x and one weight and bias per logical shard; ``edges`` lead to where gradients go,
    the copies of x and what ``_Late`` made of the parameters."""

    @staticmethod
    def forward(ctx: Any, values: Any, left: list[Any], product: Product, *edges: Tensor | None) -> tuple[Tensor, ...]:
        whole, weights, biases = values
        ctx.left, ctx.product, ctx.num_edges = left, product, len(edges)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(whole, *weights)
        products = [product.forward(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        # Not the views that F.linear may give: as results they could not be modified in place.
        return tuple(torch.ops.aten._unsafe_view(y, y.shape) for y in products)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what goes past autograd would be missing without a word
            raise RuntimeError("a column-parallel layer cannot be differentiated twice: no create_graph=True here")
        whole, *weights = ctx.saved_tensors
        flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        late = ctx.next_functions[-1][0]
        if torch._C._will_engine_execute_node(late):
            ctx.left[:] = [(flat, whole.reshape(-1, whole.shape[-1]))]
        terms = [
            None if grad is None else ctx.product.input_grad(grad, weight).view(whole.shape)
            for grad, weight in zip(flat, weights, strict=True)
        ]
        return (None, None, None, *terms, *[None] * (ctx.num_edges - len(terms)))


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


def multiply_reduce(x: Tensor, weight: Tensor, *, group: Group, product: Product) -> Tensor:
    """``x [..., in/w]`` times ``weight [out, in/w]``, summed over ranks in the backend's order: ``[..., out]``."""
    rows: Tensor = _MultiplyReduce.apply(x, weight, group, product)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], weight.shape[0])
