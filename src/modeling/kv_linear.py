"""The key or value projection where there are fewer heads than logical shards."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..distributed.group import as_group
from ..distributed.random import fill_shards, uniform
from ..distributed.regions import join_shards, share_shards
from ..sharding import MAX_SHARDS, shared_range
from .checks import check_activations
from .columns import column_products
from .conversion import check_plain, take_parameters


class KVParallelLinear(nn.Module):
    """``y = x W^T + b`` with whole heads shared by runs of ``V / num_heads`` logical shards.

    Head h belongs to the logical shards ``[h * V / num_heads, (h + 1) * V / num_heads)``; a rank holds every head that
    one of its shards uses, so that with more ranks than heads each head has replicas. Every logical shard multiplies by
    its head on its own, and the gradients of a head are summed over its shards in the fixed tree: replicas stay equal,
    and the bits do not depend on the number of ranks. The head is drawn from seed ``init_base_seed + h``.

    Raises ValueError unless ``num_heads`` divides the number of logical shards.
    """

    products = staticmethod(column_products)  # as in ColumnParallelLinear

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        group: Any = None,
        init_base_seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.group = as_group(group)
        self.in_features, self.num_heads, self.head_dim = in_features, num_heads, head_dim
        self.init_base_seed = init_base_seed
        if self.group.num_shards % num_heads:
            raise ValueError(
                f"n_kv_heads={num_heads} must divide num_shards={self.group.num_shards} or be a multiple of it, "
                f"over world_size={self.group.world_size} ranks"
            )
        self.replicas = self.group.num_shards // num_heads
        self.heads = shared_range(self.group.shards, self.replicas)
        rows = len(self.heads) * head_dim
        self.weight = nn.Parameter(torch.empty(rows, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device=device)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_heads: int, *, group: Any = None) -> Self:
        """This rank's heads of an ordinary ``linear`` to ``num_heads`` heads that all ranks hold alike.

        Raises ValueError when ``num_heads`` does not divide its output features; TypeError when its parameters are no
        plain tensors (DTensors, quantized ones).
        """
        layer = cls.shaped_like(linear, num_heads, group=group)
        take_parameters(layer, linear)
        return layer

    @classmethod
    def shaped_like(cls, linear: nn.Linear, num_heads: int, *, group: Any = None) -> Self:
        """What ``from_linear`` returns, still without numbers: on the meta device."""
        check_plain(linear)
        if linear.out_features % num_heads:
            raise ValueError(f"out_features={linear.out_features} is not a multiple of num_heads={num_heads}")
        options: dict[str, Any] = {"bias": linear.bias is not None, "dtype": linear.weight.dtype, "device": "meta"}
        head_dim = linear.out_features // num_heads
        return cls(linear.in_features, num_heads, head_dim, group=group, **options).train(linear.training)

    def reset_parameters(self) -> None:
        """Draw this rank's heads anew."""
        bound = 1 / math.sqrt(self.in_features)
        seeds = [self.init_base_seed + head for head in self.heads]
        fill_shards(self.weight.detach().chunk(len(self.heads)), seeds, uniform(-bound, bound))
        if self.bias is not None:
            seeds = [seed + MAX_SHARDS for seed in seeds]
            fill_shards(self.bias.detach().chunk(len(self.heads)), seeds, uniform(-bound, bound))

    def shard_dims(self) -> dict[str, int]:
        """The sharded parameters and their sharded dim."""
        if self.group.num_shards == 1:
            return {}
        return {"weight": 0} if self.bias is None else {"weight": 0, "bias": 0}

    def shard_replicas(self) -> dict[str, int]:
        """How many logical shards share one piece."""
        return {"weight": self.replicas, "bias": self.replicas}

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in] -> y [..., V/w * head_dim]``: the head of each logical shard of this rank in turn."""
        check_activations(x, self.in_features, "KVParallelLinear")
        (products,) = self.products(x, [self], group=self.group)
        return join_shards(self.finish_shards(products))

    def shard_parameters(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weight ``[head_dim, in]`` and bias of each logical shard of this rank."""
        place: dict[str, Any] = {"group": self.group, "replicas": self.replicas}
        weights = share_shards(self.weight, **place)
        return weights, [None] * len(weights) if self.bias is None else [*share_shards(self.bias, **place)]

    def finish_shards(self, products: list[Tensor]) -> list[Tensor]:
        """As in ColumnParallelLinear."""
        return products

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_heads={self.num_heads}, head_dim={self.head_dim}, group={self.group}"
        )
