"""Column-parallel layers that share their input, and thus one sum of its gradient over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..distributed.group import Group
from ..distributed.overlap import EarlySum, Parameters, Product
from ..distributed.regions import copy_to_shards, gather_to_shards
from ..functional import linear, linear_input_grad, linear_weight_grad, product_dtype

PRODUCT = Product(linear, linear_input_grad, linear_weight_grad)

MIN_BYTES = 2**20
"""From this size on the gradient of an input is summed over the ranks while the gradients of weights are computed."""


class ColumnLayer(Protocol):
    """A layer whose outputs are sharded, one piece per logical shard."""

    weight: nn.Parameter
    bias: nn.Parameter | None

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
    shared = SharedCopies(x, layers, group=group, sequence_parallel=sequence_parallel)
    return [shared.products(layer) for layer in layers]


class SharedCopies:
    """What ``column_products`` makes of ``x``, for layers of which it is not yet known which will be asked for."""

    def __init__(
        self, x: Tensor, layers: Iterable[ColumnLayer], *, group: Group, sequence_parallel: bool = False
    ) -> None:
        self._x = x
        size = x.nbytes * (group.world_size if sequence_parallel else 1)
        early = group.world_size > 1 and size >= MIN_BYTES and _learns(x)
        self._states = {layer: state for layer in layers if (state := _state(x, layer))} if early else {}
        if self._states:
            parameters = {layer: _cast(layer, dtype) for layer, (dtype, _) in self._states.items()}
            place: Any = {"group": group, "sequence_parallel": sequence_parallel}
            self._sum = EarlySum(x, parameters, product=PRODUCT, **place)
            self._copies = self._sum.copies
        else:
            self._copies = copies(x, group=group, sequence_parallel=sequence_parallel)

    def products(self, layer: ColumnLayer) -> list[Tensor]:
        """``x W^T + b`` of each logical shard of this rank: ``[..., out/V]``."""
        state = self._states.pop(layer, None)
        if state is not None and state == _state(self._x, layer):
            return self._sum.multiply(layer)
        return list(map(linear, self._copies, *layer.shard_parameters()))


def copies(x: Tensor, *, group: Group, sequence_parallel: bool) -> list[Tensor]:
    """The whole ``[..., in]`` once per logical shard of this rank, of ``x`` as ``column_shards`` takes it."""
    return (gather_to_shards if sequence_parallel else copy_to_shards)(x, group=group)


def _learns(x: Tensor) -> bool:
    """Whether a gradient of ``x`` will be asked for. A compiled graph orders its work by itself."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _state(x: Tensor, layer: ColumnLayer) -> tuple[torch.dtype, list[tuple[int, int]]] | None:
    """In which dtype ``layer`` multiplies, with which parameters; None where its weight does not learn, or is more than
    a plain tensor."""
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    dtype = product_dtype(x, *parameters)
    if dtype is None or not layer.weight.requires_grad:
        return None
    if any(type(parameter) not in (Tensor, nn.Parameter) for parameter in parameters):
        return None
    return dtype, [(id(parameter), parameter._version) for parameter in parameters]


def _cast(layer: ColumnLayer, dtype: torch.dtype) -> Parameters:
    weights, biases = layer.shard_parameters()
    return [weight.to(dtype) for weight in weights], [None if bias is None else bias.to(dtype) for bias in biases]
