"""RMS norms over all channels or over groups of channels, replicated or sharded over hidden."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.group import group_or_single
from ..distributed.random import fill_shards, uniform
from ..distributed.regions import copy_to_shards, join_shards, reduce_from_shards, split_shards
from ..functional import add_group_rms_norm, add_rms_norm, group_rms_norm, rms_norm, wide
from ..sharding import run_lengths, shard_size
from .checks import check_activations, check_residual


class RMSNorm(nn.Module):
    """``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dim (Zhang & Sennrich 2019); ``weight`` starts at 1.

    Statistics are taken in float32 or wider; the output follows the input's dtype and device. With
    ``sequence_parallel`` x is this rank's part ``[b, s/w, h]`` of the sequence, and the gradient of ``weight`` is
    summed over the V pieces of the sequence: without that sum every rank would train a weight of its own.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        group: Any = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.group, self.sequence_parallel = group_or_single(group), sequence_parallel
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set ``weight`` to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``x [..., h] -> y [..., h]``; with a ``residual`` of the same shape, y of ``x + residual``, and that sum."""
        check_activations(x, self.hidden_size, "RMSNorm", self.sequence_parallel)
        check_residual(x, residual, "RMSNorm")
        weights = copy_to_shards(self.weight, group=self.group) if self.sequence_parallel else [self.weight]
        if len(weights) == 1 and residual is not None:
            return add_rms_norm(x, residual, weights[0], self.eps)
        if residual is not None:
            x = x + residual
        pieces = split_shards(x, group=self.group, dim=1) if self.sequence_parallel else [x]
        y = join_shards([rms_norm(xj, wj, self.eps) for xj, wj in zip(pieces, weights, strict=True)], dim=1)
        return y if residual is None else (y, x)


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
        self.hidden_size, self.eps = hidden_size, eps
        self.group_size = hidden_size if group_size is None else group_size
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

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``x [..., h] -> y [..., h]``; with a group ``[..., h/w] -> [..., h/w]``.

        With a ``residual`` of x's shape, y of ``x + residual``, and that sum.
        """
        check_activations(x, self.weight.shape[0], "GroupRMSNorm")
        check_residual(x, residual, "GroupRMSNorm")
        weights = split_shards(self.weight, group=self.group, dim=0)
        inside = self.shard_width % self.group_size == 0
        if inside and len(weights) == 1 and residual is not None:
            return add_group_rms_norm(x, residual, weights[0], self.group_size, self.eps)
        if residual is not None:
            x = x + residual
        shards = split_shards(x, group=self.group)
        y = join_shards(self._norm_shards(shards, weights) if inside else self._norm_across_shards(shards, weights))
        return y if residual is None else (y, x)

    def _norm_shards(self, shards: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        return [group_rms_norm(x, weight, self.group_size, self.eps) for x, weight in zip(shards, weights, strict=True)]

    def _norm_across_shards(self, shards: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        """Each shard is cut where a group of channels ends; the sums of squares of the runs are exchanged."""
        groups = self.hidden_size // self.group_size
        first = [shard * self.shard_width // self.group_size for shard in self.group.shards]
        lengths = [
            run_lengths(shard * self.shard_width, self.shard_width, self.group_size) for shard in self.group.shards
        ]
        runs = [x.to(wide(x.dtype)).split(cuts, -1) for x, cuts in zip(shards, lengths, strict=True)]
        sums = [torch.stack([run.square().sum(-1) for run in own], -1) for own in runs]
        terms = [F.pad(own, (i, groups - i - own.shape[-1])) for own, i in zip(sums, first, strict=True)]
        # Each shard uses the total for its own channels only, so the total's gradient is a sum over shards again.
        totals = copy_to_shards(reduce_from_shards(terms, group=self.group), group=self.group)
        out = []
        for x, weight, own, i, total in zip(shards, weights, runs, first, totals, strict=True):
            scales = torch.rsqrt(total / self.group_size + self.eps)[..., i : i + len(own)].split(1, -1)
            y = torch.cat([run * scale for run, scale in zip(own, scales, strict=True)], -1) * weight.to(x.device)
            out.append(y.to(x.dtype))
        return out
