"""RMS norms over all channels or over groups of channels, replicated or sharded over hidden."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.group import group_or_single
from ..distributed.random import fill_shards, uniform
from ..distributed.regions import copy_to_region, reduce_from_shards
from ..functional import group_rms_norm, rms_norm, wide
from ..sharding import shard_size
from .checks import check_activations


class RMSNorm(nn.Module):
    """``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dim (Zhang & Sennrich 2019); ``weight`` starts at 1.

    Statistics are taken in float32 or wider; the output follows the input's dtype and device.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set ``weight`` to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., h] -> y [..., h]``."""
        check_activations(x, self.hidden_size, "RMSNorm")
        return rms_norm(x, self.weight, self.eps)


class GroupRMSNorm(nn.Module):
    """RMSNorm taken separately over each run of ``group_size`` consecutive channels.

        y[g] = x[g] / sqrt(mean(x[g]^2) + eps) * weight[g]

    The statistics are taken in float32 or wider. ``dtype`` and ``device`` place ``weight`` alone; the output always
    follows the input. ``weight`` is drawn uniformly from ``init_range`` with ``init_seed``. ``group_size`` None means
    ``hidden_size``: one group.

    With ``group`` given, x is sharded over hidden, as after a column-parallel layer: ``weight`` is this rank's slice of
    the same draw. Groups of channels inside a logical shard need no communication; wider ones cost one small
    all-reduce forward and one backward.

    Raises ValueError when ``group_size`` does not divide ``hidden_size`` or the group cannot shard it.
    """

    def __init__(
        self,
        hidden_size: int,
        group_size: int | None = None,
        eps: float = 1e-5,
        init_range: tuple[float, float] = (-1.0, 1.0),
        init_seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.group = group_or_single(group)
        self.hidden_size, self.group_size, self.eps = hidden_size, group_size or hidden_size, eps
        if self.group_size < 1 or hidden_size % self.group_size:
            raise ValueError(f"group_size={self.group_size} must be positive and divide hidden_size={hidden_size}")
        self.init_range, self.init_seed = init_range, init_seed
        size = shard_size("hidden_size", hidden_size, self.group.num_shards, self.group.world_size)
        self.shard_width = size
        self.weight = nn.Parameter(torch.empty(size * len(self.group.shards), dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all of the weight from ``init_seed`` and keep this rank's slice."""
        whole = torch.empty(self.hidden_size, dtype=self.weight.dtype, device=self.weight.device)
        fill_shards([whole], [self.init_seed], uniform(*self.init_range))
        with torch.no_grad():
            self.weight.copy_(whole.chunk(self.group.world_size)[self.group.rank])

    def shard_dims(self) -> dict[str, int]:
        """The sharded parameters and their sharded dim."""
        return {"weight": 0} if self.group.num_shards > 1 else {}

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., h] -> y [..., h]``; with a group ``[..., h/w] -> [..., h/w]``."""
        check_activations(x, self.weight.shape[0], "GroupRMSNorm")
        if self.shard_width % self.group_size == 0:
            return group_rms_norm(x, self.weight, self.group_size, self.eps)
        return self._norm_across_shards(x)

    def _norm_across_shards(self, x: Tensor) -> Tensor:
        """Channels are cut into blocks that lie in one group and one shard; block sums of squares are exchanged."""
        block = math.gcd(self.group_size, self.shard_width)
        first = self.group.rank * self.weight.shape[0]
        blocks = x.to(wide(x.dtype)).unflatten(-1, (-1, block))
        owner = torch.arange(first, first + self.weight.shape[0], block, device=x.device) // self.group_size
        shards = zip(self.group.split(blocks.square().sum(-1), -1), self.group.split(owner), strict=True)
        zeros = blocks.new_zeros(*x.shape[:-1], self.hidden_size // self.group_size)
        total = reduce_from_shards([zeros.index_add(-1, own, sums) for sums, own in shards], group=self.group)
        # Each rank uses the sum for its own channels only, so its gradient is a sum over ranks again.
        mean = copy_to_region(total, group=self.group) / self.group_size
        scale = torch.rsqrt(mean + self.eps).index_select(-1, owner).unsqueeze(-1)
        y: Tensor = (blocks * scale).flatten(-2) * self.weight.to(x.device)
        return y.to(x.dtype)
