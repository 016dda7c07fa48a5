"""Column-parallel layers that share their input, and thus one sum of its gradient over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..distributed.group import Group
from ..distributed.overlap import EarlySum, Prepared, Product
from ..distributed.regions import copy_to_shards, gather_to_shards
from ..functional import linear, linear_input_grad, linear_weight_grad, product_dtype

PRODUCT = Product(linear, linear_input_grad, linear_weight_grad)

_State = tuple[torch.dtype, list[tuple[int, int]]]

MIN_BYTES = 2**20
"""From this size on the gradient of an input is summed over the ranks while the gradients of weights are computed."""


class ColumnLayer(Protocol):
    """A layer whose outputs are sharded, one piece per logical shard."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _forward_pre_hooks: Any

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
    """What ``column_products`` makes of ``x``, for layers of which it is not yet known which will be asked for.

    Those whose parameters only a hook brings are left alone until they are.
    """

    def __init__(
        self, x: Tensor, layers: Iterable[ColumnLayer], *, group: Group, sequence_parallel: bool = False
    ) -> None:
        self._x = x
        self._sum: EarlySum | None = None
        self._prepared: dict[ColumnLayer, tuple[_State, Prepared]] = {}
        place: Any = {"group": group, "sequence_parallel": sequence_parallel}
        size = x.nbytes * (group.world_size if sequence_parallel else 1)
        early = group.world_size > 1 and size >= MIN_BYTES and _learns(x)
        states = {layer: _state(x, layer) for layer in layers} if early else {}
        if any(states.values()):
            free = [(layer, state) for layer, state in states.items() if state and not layer._forward_pre_hooks]
            # Before the sum of x, so that sums of their own come after it in backward.
            ready = [(layer, state, layer.shard_parameters()) for layer, state in free]
            self._sum = EarlySum(x, product=PRODUCT, **place)
            for layer, state, own in ready:
                self._prepared[layer] = state, self._sum.prepare(*own)
        self._copies = self._sum.start() if self._sum else copies(x, **place)

    def products(self, layer: ColumnLayer) -> list[Tensor]:
        """``x W^T + b`` of each logical shard of this rank: ``[..., out/V]``."""
        state = _state(self._x, layer) if self._sum else None
        if self._sum is None or state is None:
            return list(map(linear, self._copies, *layer.shard_parameters()))
        noted, prepared = self._prepared.pop(layer, (None, None))
        if prepared is None or noted != state:
            prepared = self._sum.prepare(*layer.shard_parameters())
        return self._sum.multiply(prepared, state[0])


def copies(x: Tensor, *, group: Group, sequence_parallel: bool) -> list[Tensor]:
    """The whole ``[..., in]`` once per logical shard of this rank, of ``x`` as ``column_shards`` takes it."""
    return (gather_to_shards if sequence_parallel else copy_to_shards)(x, group=group)


def _learns(x: Tensor) -> bool:
    """Whether a gradient of ``x`` will be asked for. A compiled graph orders its work by itself."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _state(x: Tensor, layer: ColumnLayer) -> _State | None:
    """In which dtype ``layer`` multiplies, with which parameters; None where its weight does not learn, or is more than
    a plain tensor."""
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    dtype = product_dtype(x, *parameters)
    if dtype is None or not layer.weight.requires_grad:
        return None
    if any(type(parameter) not in (Tensor, nn.Parameter) for parameter in parameters):
        return None
    return dtype, [(id(parameter), parameter._version) for parameter in parameters]
