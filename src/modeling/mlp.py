"""Llama's feed-forward network, its hidden features sharded over the group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.group import group_or_single
from ..distributed.random import SEED_STRIDE
from ..functional import swiglu
from .checks import check_activations
from .columns import column_shards
from .dropout import ParallelDropout
from .linear import ColumnParallelLinear, RowParallelLinear


def feed_forward_size(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Llama's rounding: two thirds of ``hidden_dim``, times the multiplier, up to a multiple of ``multiple_of``.

    >>> feed_forward_size(4 * 4096, 1024, 1.3)
    14336
    """
    size = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        size = int(ffn_dim_multiplier * size)
    return multiple_of * -(-size // multiple_of)


class FeedForward(nn.Module):
    """``w2(silu(w1 x) * w3 x)``. w1 and w3 share their input: one all-reduce forward, one backward.

    ``size`` is the number of hidden features as it is; None leaves it to ``feed_forward_size``. With ``group=None``
    this is an ordinary single-process module. Raises ValueError when the logical shards do not divide the size.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        multiple_of: int,
        ffn_dim_multiplier: float | None = None,
        *,
        size: int | None = None,
        group: Any = None,
        sequence_parallel: bool = False,
        dropout: float = 0.0,
        init_base_seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.dim, self.group, self.sequence_parallel = dim, group_or_single(group), sequence_parallel
        size = feed_forward_size(hidden_dim, multiple_of, ffn_dim_multiplier) if size is None else size
        if size < 1:
            raise ValueError(f"hidden_dim={hidden_dim}, ffn_dim_multiplier={ffn_dim_multiplier} leave no features")
        options: dict[str, Any] = {"bias": False, "group": self.group, "dtype": dtype, "device": device}
        self.w1 = ColumnParallelLinear(dim, size, init_base_seed=init_base_seed, **options)
        self.w2 = RowParallelLinear(size, dim, init_base_seed=init_base_seed + SEED_STRIDE, **options)
        self.w3 = ColumnParallelLinear(dim, size, init_base_seed=init_base_seed + 2 * SEED_STRIDE, **options)
        self.w2.sequence_parallel = sequence_parallel
        self.dropout = ParallelDropout(dropout, group=self.group, seed=init_base_seed + 3 * SEED_STRIDE)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., h] -> [..., h]``, both replicated, or with ``sequence_parallel`` both ``[b, s/w, h]``."""
        check_activations(x, self.dim, "FeedForward", self.sequence_parallel)
        place: dict[str, Any] = {"group": self.group, "sequence_parallel": self.sequence_parallel}
        gates, ups = column_shards(x, (self.w1, self.w3), **place)
        hidden = [swiglu(gate, up) for gate, up in zip(gates, ups, strict=True)]
        return self.w2.forward_shards(self.dropout.forward_shards(hidden))
