"""Collectives that run while matrix products are computed. Beside ``regions``, where autograd meets communication.

    EarlySum          forward: products              backward: dx = sum of dy W; its all_reduce runs during dW = dy^T x
    multiply_reduce   forward: products by chunks    backward: products
                      of tokens, the all_reduce of one during the product of the next

The first has the bits of ``copy_to_shards`` (or ``gather_to_shards``) followed by products, whatever the order of sums.
The second has not, for a kernel may take another path for fewer rows: it is for sums in the backend's order alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .collectives import all_gather, start_all_reduce, start_reduce_scatter
from .group import Group
from .reduction import tree_sum

Parameters = tuple[Sequence[Tensor], Sequence[Tensor | None]]
"""Weights ``[out, in]`` and biases ``[out]`` of a layer, one of each per logical shard of this rank."""

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


class EarlySum:
    """Copies of ``x`` to multiply, one layer after another, whose gradients are summed before those of the weights.

    Autograd runs the nodes that it can in the reverse order of their making: those of ``multiply`` hand the gradient of
    x on and leave what the weights need to ``_Late``; when all did, ``_Start`` sums over shards and starts the
    collective; the nodes of ``_Late``, which are older, compute the gradients of weights; ``_Finish`` waits. Another
    order would only cost time.
    """

    def __init__(
        self, x: Tensor, layers: Mapping[Any, Parameters], *, group: Group, product: Product, sequence_parallel: bool
    ) -> None:
        self._product = product
        self._layers: dict[Any, tuple[list[Any], Sequence[Tensor | None], torch.dtype]] = {}
        self._wholes: dict[torch.dtype, Tensor] = {}
        running: list[Callable[[], Tensor]] = []
        entered = _Finish.apply(x, running)  # type: ignore[no-untyped-call]
        for layer, (weights, biases) in layers.items():
            left: list[Any] = []
            late = _Late.apply(left, product, *weights, *biases)  # type: ignore[no-untyped-call]
            self._layers[layer] = left, late, weights[0].dtype
        self.copies: Sequence[Tensor] = _Start.apply(  # type: ignore[no-untyped-call]
            entered, group, sequence_parallel, running
        )

    def multiply(self, layer: Any) -> list[Tensor]:
        """``x W^T + b`` of each logical shard of this rank: ``[..., out]`` each. Once for each layer."""
        left, late, dtype = self._layers.pop(layer)
        if dtype not in self._wholes:
            self._wholes[dtype] = self.copies[0].detach().to(dtype)
        return list(
            _Multiply.apply(  # type: ignore[no-untyped-call]
                self._wholes[dtype], left, self._product, *self.copies, *late
            )
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
    """``tensors`` are copies of x, weights and biases, one of each per logical shard."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, left: list[Any], product: Product, *tensors: Any) -> tuple[Tensor, ...]:
        count = len(tensors) // 3
        weights, biases = tensors[count : 2 * count], tensors[2 * count :]
        ctx.left, ctx.product = left, product
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(whole, *weights)
        return tuple(product.forward(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        flat = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        ctx.left[:] = [(flat, whole.reshape(-1, whole.shape[-1]))]
        terms = [
            None if grad is None else ctx.product.input_grad(grad, weight).view(whole.shape)
            for grad, weight in zip(flat, weights, strict=True)
        ]
        return (None, None, None, *terms, *[None] * (2 * len(weights)))


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
