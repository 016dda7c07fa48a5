"""Column-parallel layers that share their input, and thus one sum of its gradient over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..distributed.group import Group
from ..distributed.overlap import Product, multiply_copies
from ..distributed.regions import copy_to_shards, gather_to_shards
from ..functional import linear, linear_input_grad, linear_weight_grad, product_dtype

PRODUCT = Product(linear, linear_input_grad, linear_weight_grad)

MIN_BYTES = 2**20
"""From this size on the gradient of an input is summed over the ranks while the gradients of weights are computed."""


class ColumnLayer(Protocol):
    """A layer whose outputs are sharded, one piece per logical shard."""

    def shard_parameters(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weight ``[out/V, in]`` and bias of each logical shard of this rank."""

    def finish_shards(self, products: list[Tensor]) -> list[Tensor]:
        """What is left to do with each ``x W^T + b``."""


def column_shards(
    x: Tensor, layers: Sequence[ColumnLayer], *, group: Group, sequence_parallel: bool = False
) -> list[list[Tensor]]:
    """Replicated ``x [..., in]`` to one ``[..., out/V]`` per logical shard of this rank, for each layer."""
    products = column_products(x, layers, group=group, sequence_parallel=sequence_parallel)
    return [layer.finish_shards(product) for layer, product in zip(layers, products, strict=True)]


def column_products(
    x: Tensor, layers: Sequence[ColumnLayer], *, group: Group, sequence_parallel: bool = False
) -> list[list[Tensor]]:
    """``x W^T + b`` alone, of which ``column_shards`` makes what the layers give.

    With ``sequence_parallel`` x is this rank's part ``[b, s/w, in]`` of the sequence, gathered first. Backward is one
    all-reduce or reduce-scatter, at work while the gradients of the weights are computed where x is large enough. Both
    ways have the same bits.
    """
    parameters = [layer.shard_parameters() for layer in layers]
    weights = [weight for own, _ in parameters for weight in own]
    dtype = product_dtype(x, *weights)
    size = x.nbytes * (group.world_size if sequence_parallel else 1)
    if group.world_size > 1 and size >= MIN_BYTES and dtype is not None and _learns(x, weights):
        biases = [None if bias is None else bias.to(dtype) for _, own in parameters for bias in own]
        place: Any = {"group": group, "product": PRODUCT, "sequence_parallel": sequence_parallel}
        found = iter(multiply_copies(x, [weight.to(dtype) for weight in weights], biases, **place))
        return [[next(found) for _ in own] for own, _ in parameters]
    inputs = copies(x, group=group, sequence_parallel=sequence_parallel)
    return [list(map(linear, inputs, *own)) for own in parameters]


def copies(x: Tensor, *, group: Group, sequence_parallel: bool) -> list[Tensor]:
    """The whole ``[..., in]`` once per logical shard of this rank, of ``x`` as ``column_shards`` takes it."""
    return (gather_to_shards if sequence_parallel else copy_to_shards)(x, group=group)


def _learns(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether gradients of ``x`` and of a weight will be asked for. A compiled graph orders its work by itself."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return x.requires_grad and any(weight.requires_grad for weight in weights)
