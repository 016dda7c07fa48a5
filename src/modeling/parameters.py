"""What the layers say about their parameters, gathered for a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed.collectives import all_gather
from ..distributed.group import Group
from ..sharding import shared_range


@dataclass(frozen=True)
class Placement:
    """Where a parameter of a model lies: ``dim`` is its sharded dim (None: replicated), ``size`` the real length of it.

    ``size`` counts no padding and no replicas: a padded vocabulary has fewer rows than the ranks hold together, and so
    have kv heads of which each is shared by ``replicas`` logical shards.
    """

    name: str
    parameter: nn.Parameter
    dim: int | None
    size: int
    replicas: int

    def offset(self, group: Group) -> int:
        """Where this rank's slice begins in the whole: 0 for a replicated parameter."""
        if self.dim is None:
            return 0
        pieces = shared_range(group.shards, self.replicas)
        return pieces.start * self._piece_length(len(pieces))

    def counted(self, tensor: Tensor, group: Group) -> list[Tensor | None]:
        """For each logical shard of this rank the piece of ``tensor`` that it counts in a sum over everything.

        Of the shards that share a piece the first one counts it; the others have None.
        """
        pieces = shared_range(group.shards, self.replicas)
        views = tensor.split(self._piece_length(len(pieces)), self.dim or 0)
        return [
            None if shard % self.replicas else views[shard // self.replicas - pieces.start] for shard in group.shards
        ]

    def whole(self, tensor: Tensor, group: Group) -> Tensor:
        """The unsharded ``tensor``, without padding or replicas, on every rank. Called by all ranks."""
        if self.dim is None:
            return tensor
        sharers = max(self.replicas // len(group.shards), 1)
        parts = all_gather(tensor, group=group, dim=self.dim).chunk(group.world_size, self.dim)
        return torch.cat(parts[::sharers], self.dim).narrow(self.dim, 0, self.size)

    def _piece_length(self, pieces: int) -> int:
        return self.parameter.shape[self.dim or 0] // pieces


def placements(model: nn.Module, *, group: Group) -> Iterator[Placement]:
    """Every parameter once, tied ones under their first name, in the model's order."""
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        dims, unpadded, replicas = (_ask(module, what) for what in ("shard_dims", "unpadded_sizes", "shard_replicas"))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            dim, sharers = dims.get(name), replicas.get(name, 1)
            pieces = len(shared_range(group.shards, sharers))
            length = 0 if dim is None else parameter.shape[dim] // pieces * (group.num_shards // sharers)
            full_name = f"{path}.{name}" if path else name
            yield Placement(full_name, parameter, dim, unpadded.get(name, length), sharers)


def _ask(module: nn.Module, what: str) -> dict[str, int]:
    answer: dict[str, int] = getattr(module, what)() if hasattr(module, what) else {}
    return answer
