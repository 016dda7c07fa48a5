"""Linear layers whose weight is sharded over its output or its input features.

Legend: w = world_size, V = num_shards, x [..., in], y [..., out], weight [out, in] as in ``nn.Linear``.

    ColumnParallelLinear   weight [out/w, in]   x replicated        y sharded over its last dim
    RowParallelLinear      weight [out, in/w]   x sharded           y replicated: the sum over shards, plus bias

Each rank computes its V/w logical shards one by one, with the same shapes at every w; that, and sums in one tree,
is what makes the bits independent of w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..distributed.collectives import sums_at_once
from ..distributed.group import as_group
from ..distributed.overlap import multiply_reduce
from ..distributed.random import fill_shards, uniform
from ..distributed.regions import (
    copy_to_shards,
    gather_from_region,
    join_shards,
    reduce_from_shards,
    reduce_scatter_from_shards,
    scatter_to_region,
    split_shards,
)
from ..functional import linear, product_dtype
from ..sharding import MAX_SHARDS, shard_size
from .checks import check_activations
from .columns import PRODUCT, column_products
from .conversion import check_plain, take_parameters

MIN_FLOPS = 1e11
"""From this many floating-point operations on one rank on, a row-parallel product is taken in chunks of tokens, each
summed over the ranks while the next one is computed. Only for sums in the backend's order, for chunks may change bits,
and that would not be done at once, as those through shared memory are."""


class _ParallelLinear(nn.Module):
    """What both layers share: sizes, parameters, initial values.

    Weights are drawn like those of ``nn.Linear``, uniformly within ``1 / sqrt(in_features)`` of the whole matrix;
    logical shard j of the weight from seed ``init_base_seed + j``, the bias from ``init_base_seed + 512`` on.
    """

    _weight_dim: ClassVar[int]
    _bias_dim: ClassVar[int | None]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        group: Any,
        init_base_seed: int,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> None:
        super().__init__()
        self.group = as_group(group)
        self.in_features, self.out_features, self.init_base_seed = in_features, out_features, init_base_seed
        name = ("out_features", "in_features")[self._weight_dim]
        shape = [out_features, in_features]
        size = shard_size(name, shape[self._weight_dim], self.group.num_shards, self.group.world_size)
        shape[self._weight_dim] = size * len(self.group.shards)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, group: Any = None, **options: Any) -> Self:
        """This rank's part of an ordinary ``linear`` that all ranks hold alike; ``options`` as for the constructor.

        Raises TypeError when its parameters are no plain tensors (DTensors, quantized ones).
        """
        layer = cls.shaped_like(linear, group=group, **options)
        take_parameters(layer, linear)
        return layer

    @classmethod
    def shaped_like(cls, linear: nn.Linear, *, group: Any = None, **options: Any) -> Self:
        """What ``from_linear`` returns, still without numbers: on the meta device."""
        check_plain(linear)
        options |= {"bias": linear.bias is not None, "dtype": linear.weight.dtype, "device": "meta"}
        return cls(linear.in_features, linear.out_features, group=group, **options).train(linear.training)

    def reset_parameters(self) -> None:
        """Draw this rank's logical shards of weight and bias anew."""
        draw = uniform(-1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))
        seeds = [self.init_base_seed + shard for shard in self.group.shards]
        fill_shards(self.group.split(self.weight.detach(), self._weight_dim), seeds, draw)
        if self.bias is not None:
            seeds = [seed + MAX_SHARDS for seed in seeds]
            if self._bias_dim is None:
                fill_shards([self.bias.detach()], [self.init_base_seed + MAX_SHARDS], draw)
            else:
                fill_shards(self.group.split(self.bias.detach()), seeds, draw)

    def shard_dims(self) -> dict[str, int]:
        """The sharded parameters and their sharded dim."""
        if self.group.num_shards == 1:
            return {}
        dims = {"weight": self._weight_dim}
        return dims if self._bias_dim is None or self.bias is None else dims | {"bias": self._bias_dim}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}"


class ColumnParallelLinear(_ParallelLinear):
    """``y = x W^T + b`` with the output features sharded; the gradient of x is summed over all shards.

    ``group`` is a Group, a ProcessGroup, a 1-D DeviceMesh, or None: the initialised default group, or a world of one.
    ``gather_output`` makes y replicated. With ``sequence_parallel`` x is this rank's part of the sequence, gathered
    first.

    Raises ValueError when the logical shards do not divide ``out_features``.
    """

    _weight_dim = 0
    _bias_dim = 0
    products = staticmethod(column_products)  # of layers that share the copies of their input, those of a module

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Any = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        init_base_seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(in_features, out_features, bias, group, init_base_seed, dtype, device)
        self.gather_output, self.sequence_parallel = gather_output, sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> y [..., out/w]``, or ``[..., out]`` with ``gather_output``."""
        check_activations(x, self.in_features, type(self).__name__, self.sequence_parallel)
        (products,) = self.products(x, [self], group=self.group, sequence_parallel=self.sequence_parallel)
        y = join_shards(self.finish_shards(products))
        return gather_from_region(y, group=self.group) if self.gather_output else y

    def shard_parameters(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weight ``[out/V, in]`` and bias of each logical shard of this rank."""
        weights = split_shards(self.weight, group=self.group, dim=0)
        return weights, [None] * len(weights) if self.bias is None else [*self.group.split(self.bias)]

    def finish_shards(self, products: list[Tensor]) -> list[Tensor]:
        """The outputs, from ``x W^T + b`` of each logical shard of this rank."""
        return products


class RowParallelLinear(_ParallelLinear):
    """``y = x W^T + b`` with the input features sharded; y is summed over all shards, then the bias is added once.

    ``group`` as for ColumnParallelLinear. With ``input_is_parallel=False`` x is replicated and cut here. With
    ``sequence_parallel`` each rank gets its part of the sequence, ``y [b, s/w, out]``.

    Raises ValueError when the logical shards do not divide ``in_features``.
    """

    _weight_dim = 1
    _bias_dim = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Any = None,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        init_base_seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(in_features, out_features, bias, group, init_base_seed, dtype, device)
        self.input_is_parallel, self.sequence_parallel = input_is_parallel, sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in/w]`` (``[..., in]`` unless ``input_is_parallel``) ``-> y [..., out]``."""
        local = self.weight.shape[1]
        size = local if self.input_is_parallel else self.in_features
        check_activations(x, size, "RowParallelLinear", self.sequence_parallel)
        if not self.input_is_parallel:
            x = scatter_to_region(x, group=self.group)
        return self.forward_shards(split_shards(x, group=self.group))

    def forward_shards(self, inputs: Sequence[Tensor]) -> Tensor:
        """One ``x [..., in/V]`` per logical shard of this rank to ``y [..., out]``."""
        weights = split_shards(self.weight, group=self.group, dim=1)
        if self._sums_by_chunks(inputs[0]):
            dtype = product_dtype(inputs[0], weights[0])
            x, weight = (tensor.to(dtype) for tensor in (inputs[0], weights[0]))
            y = multiply_reduce(x, weight, group=self.group, product=PRODUCT)
            return y if self.bias is None else y + self.bias
        terms = [linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]
        if not self.sequence_parallel:
            y = reduce_from_shards(terms, group=self.group)
            return y if self.bias is None else y + self.bias
        y = reduce_scatter_from_shards(terms, group=self.group)
        if self.bias is None:
            return y
        biases = copy_to_shards(self.bias, group=self.group)
        pieces = split_shards(y, group=self.group, dim=1)
        return join_shards([piece + bias for piece, bias in zip(pieces, biases, strict=True)], dim=1)

    def _sums_by_chunks(self, x: Tensor) -> bool:
        """Whether the product of ``x [..., in/w]`` is summed by chunks of tokens. Never where bits are promised."""
        if self.group.world_size == 1 or self.group.reduce_order == "tree" or self.sequence_parallel:
            return False
        dtype = product_dtype(x, self.weight)
        if torch.compiler.is_compiling() or dtype is None or 2 * x.numel() * self.out_features < MIN_FLOPS:
            return False
        y = x.new_empty((), dtype=dtype).expand(*x.shape[:-1], self.out_features)
        return not sums_at_once(y, group=self.group)
