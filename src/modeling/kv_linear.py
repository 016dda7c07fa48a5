"""The key or value projection where there are fewer heads than logical shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.group import as_group
from ..distributed.random import fill_shards, uniform
from ..distributed.regions import share_shards
from ..functional import linear
from ..sharding import shared_range


class KVParallelLinear(nn.Module):
    """``y = x W^T`` with whole heads shared by runs of ``V / num_heads`` logical shards.

    Head h belongs to the logical shards ``[h * V / num_heads, (h + 1) * V / num_heads)``; a rank holds every head that
    one of its shards uses, so that with more ranks than heads each head has replicas. Every logical shard multiplies by
    its head on its own, and the gradients of a head are summed over its shards in the fixed tree: replicas stay equal,
    and the bits do not depend on the number of ranks. The head is drawn from seed ``init_base_seed + h``.

    Raises ValueError unless ``num_heads`` divides the number of logical shards.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_dim: int,
        *,
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
        self.weight = nn.Parameter(torch.empty(len(self.heads) * head_dim, in_features, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw this rank's heads anew."""
        bound = 1 / math.sqrt(self.in_features)
        seeds = [self.init_base_seed + head for head in self.heads]
        fill_shards(self.weight.detach().chunk(len(self.heads)), seeds, uniform(-bound, bound))

    def shard_dims(self) -> dict[str, int]:
        """The sharded parameters and their sharded dim."""
        return {} if self.group.num_shards == 1 else {"weight": 0}

    def shard_replicas(self) -> dict[str, int]:
        """How many logical shards share one piece."""
        return {"weight": self.replicas}

    def forward_shards(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One ``x [..., in]`` per logical shard of this rank, from ``copy_to_shards``, to ``[..., head_dim]`` each."""
        weights = share_shards(self.weight, group=self.group, replicas=self.replicas)
        return [linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]
