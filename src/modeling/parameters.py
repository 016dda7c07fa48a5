"""What the layers say about their parameters, gathered for a whole model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from ..distributed.collectives import all_gather
from ..distributed.group import Group
from ..sharding import shared_range

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""What ``torch.compile`` and torch's checkpoint wrapper put into the names of parameters."""


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor; importing their module takes a second, so it is left to those who make some."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_fully_sharded(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether ``fully_shard`` was applied to ``module``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


@dataclass(frozen=True)
class LocalPart:
    """What this process holds of a tensor: the block ``tensor``, which begins at ``offsets``."""

    tensor: Tensor
    offsets: tuple[int, ...]

    def within(self, dim: int, start: int, stop: int) -> Tensor:
        """As much of ``[start, stop)`` of the whole ``dim`` as lies here, maybe nothing: a view."""
        length = self.tensor.shape[dim]
        first, last = (min(max(at - self.offsets[dim], 0), length) for at in (start, stop))
        return self.tensor.narrow(dim, first, max(last - first, 0))


def local_part(tensor: Tensor) -> LocalPart:
    """All of an ordinary tensor; of one that ``fully_shard`` has cut (a DTensor) this process's slices.

    Raises ValueError for a DTensor that is placed in another way than ``Shard`` and ``Replicate``.
    """
    offsets = [0] * tensor.dim()
    if not is_dtensor(tensor):
        return LocalPart(tensor, tuple(offsets))
    from torch.distributed.tensor import Replicate, Shard

    sizes = list(tensor.shape)
    for count, index, placement in zip(
        tensor.device_mesh.shape, tensor.device_mesh.get_coordinate() or (), tensor.placements, strict=True
    ):
        if type(placement) is Shard:  # the slices of torch.chunk
            dim, length = placement.dim, -(-sizes[placement.dim] // count)
            start = min(index * length, sizes[dim])
            offsets[dim], sizes[dim] = offsets[dim] + start, min(length, sizes[dim] - start)
        elif not isinstance(placement, Replicate):
            raise ValueError(f"a parameter is placed as {placement}; only Shard and Replicate over a mesh are known")
    return LocalPart(tensor.to_local(), tuple(offsets))


def sharding_groups(tensor: Tensor) -> tuple[ProcessGroup, ...]:
    """The process groups over which ``fully_shard`` has cut ``tensor``; none for an ordinary one."""
    if not is_dtensor(tensor):
        return ()
    return tuple(tensor.device_mesh.get_group(i) for i, placed in enumerate(tensor.placements) if placed.is_shard())


@dataclass(frozen=True)
class Placement:
    """Where a parameter of a model lies: ``dim`` is its sharded dim (None: replicated), ``size`` the real length of it.

    ``size`` counts no padding and no replicas: a padded vocabulary has fewer rows than the ranks hold together, and so
    have kv heads of which each is shared by ``replicas`` logical shards. All of this is about the tensor-parallel
    group; ``fully_shard`` may cut this rank's part once more, over data-parallel ranks: then ``parameter`` is a
    DTensor.
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

        Of the shards that share a piece the first one counts it; the others have None. Of a DTensor's piece, what lies
        here.
        """
        pieces = shared_range(group.shards, self.replicas)
        part, length = local_part(tensor), self._piece_length(len(pieces))
        starts = [(shard // self.replicas - pieces.start) * length for shard in group.shards]
        return [
            None if shard % self.replicas else part.within(self.dim or 0, start, start + length)
            for shard, start in zip(group.shards, starts, strict=True)
        ]

    def whole(self, tensor: Tensor, group: Group) -> Tensor:
        """The unsharded ``tensor``, without padding or replicas, on every rank. Called by all ranks."""
        if is_dtensor(tensor):
            tensor = tensor.full_tensor()
        if self.dim is None:
            return tensor
        sharers = max(self.replicas // len(group.shards), 1)
        parts = all_gather(tensor, group=group, dim=self.dim).chunk(group.world_size, self.dim)
        return torch.cat(parts[::sharers], self.dim).narrow(self.dim, 0, self.size)

    def _piece_length(self, pieces: int) -> int:
        return self.parameter.shape[self.dim or 0] // pieces


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and ``torch.compile``."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner: nn.Module = getattr(model, "module" if isinstance(model, DistributedDataParallel) else "_orig_mod")
        model = inner
    return model


def plain_name(name: str) -> str:
    """``name`` as it is in the model without wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def placements(model: nn.Module, *, group: Group) -> Iterator[Placement]:
    """Every parameter once, tied ones under their first name, in the model's order, whatever wraps the model."""
    seen: set[nn.Parameter] = set()
    for path, module in unwrapped(model).named_modules():
        if is_fully_sharded(module):
            module.reshard()  # after a forward pass without a backward one the outermost shows whole parameters
        dims, unpadded, replicas = (_ask(module, what) for what in ("shard_dims", "unpadded_sizes", "shard_replicas"))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            dim, sharers = dims.get(name), replicas.get(name, 1)
            pieces = len(shared_range(group.shards, sharers))
            length = 0 if dim is None else parameter.shape[dim] // pieces * (group.num_shards // sharers)
            full_name = plain_name(f"{path}.{name}" if path else name)
            yield Placement(full_name, parameter, dim, unpadded.get(name, length), sharers)


def _ask(module: nn.Module, what: str) -> dict[str, int]:
    answer: dict[str, int] = getattr(module, what)() if hasattr(module, what) else {}
    return answer
