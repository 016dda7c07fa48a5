"""Dropout whose mask belongs to the logical shard, not to the rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.group import group_or_single
from ..distributed.origin import in_backward
from ..distributed.regions import join_shards, split_shards
from ..sharding import MAX_SHARDS


class ParallelDropout(nn.Module):
    """Zero each element with probability ``p`` and scale the others by ``1 / (1 - p)``, in training mode.

    The mask of call c is drawn by a generator of its own for each logical shard j, seeded from (seed, c, j): the global
    random state is untouched, and with ``num_shards`` fixed masks do not depend on the number of ranks. Calls are
    counted in a buffer on the CPU that is part of the state dict, so that a resumed run goes on with fresh masks. A
    recomputation during backward (activation checkpointing) repeats the masks of the last call.

    Raises ValueError for ``p`` outside [0, 1).
    """

    calls: Tensor

    def __init__(self, p: float, *, group: Any = None, seed: int = 42, sequence_parallel: bool = False) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout p={p} must lie in [0, 1)")
        self.p, self.group, self.seed, self.sequence_parallel = p, group_or_single(group), seed, sequence_parallel
        if p > 0:
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """A replicated ``x [..., h]``, or with ``sequence_parallel`` this rank's part ``[b, s/w, h]``."""
        if not self._active():
            return x
        if self.sequence_parallel:
            return join_shards(self.forward_shards(split_shards(x, group=self.group, dim=1)), dim=1)
        return self._drop(x, self._next_call(), MAX_SHARDS)

    def forward_shards(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """One tensor per logical shard of this rank."""
        if not self._active():
            return list(shards)
        call = self._next_call()
        return [self._drop(x, call, shard) for x, shard in zip(shards, self.group.shards, strict=True)]

    def _active(self) -> bool:
        return self.training and self.p > 0

    def _next_call(self) -> int:
        if not in_backward():
            self.calls += 1
        return int(self.calls)

    def _drop(self, x: Tensor, call: int, shard: int) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {call} {shard}".encode()).digest()
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest[:4], "big"))
        dropped = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(self.p, generator=generator)
        return x.masked_fill(dropped, 0) / (1 - self.p)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return self  # the counter stays on the CPU: reading it must not wait for a device

    def extra_repr(self) -> str:
        return f"p={self.p}"
