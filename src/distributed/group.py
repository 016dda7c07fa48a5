"""The group a module works in: a thin object over one ``torch.distributed.ProcessGroup``, or over a world of one."""

from __future__ import annotations

import weakref
from typing import Any, Literal, TypeGuard

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..sharding import check_num_shards, shard_range

ReduceOrder = Literal["backend", "tree"]


class Group:
    """A tensor-parallel group: who am I, among how many, and into how many logical shards parameters are cut.

    ``rank`` and ``world_size`` are read once, here. ``num_shards`` (V, default: ``world_size``) decides the bits
    of every sum over shards. ``reduce_order`` is the order of a sum across ranks: ``"backend"`` leaves it to the
    backend's own all-reduce, ``"tree"`` takes the fixed binary tree of ``reduction.tree_sum`` and is implied by
    a given ``num_shards``, for whoever fixes V wants its bits at every world size.

    ``pg`` is a ProcessGroup, a 1-D DeviceMesh, or None: the initialised default group, or a world of one.

    Raises TypeError for any other ``pg``; ValueError when this process is not in ``pg``, when ``num_shards`` does not
    fit ``world_size``, or for an unknown ``reduce_order``.
    """

    def __init__(self, pg: Any = None, *, num_shards: int | None = None, reduce_order: ReduceOrder = "backend") -> None:
        if hasattr(pg, "get_group"):
            if pg.ndim != 1:
                raise ValueError(f'a DeviceMesh of {pg.ndim} axes is no group; pass one axis of it, as mesh["tp"]')
            pg = pg.get_group()
        elif not (pg is None or pg == dist.GroupMember.NON_GROUP_MEMBER or isinstance(pg, ProcessGroup)):
            raise TypeError(f"a Group, a ProcessGroup, a 1-D DeviceMesh or None was expected, not {pg!r}")
        if pg is None and dist.is_available() and dist.is_initialized():
            pg = dist.group.WORLD
        self._setup(pg, num_shards, reduce_order)

    def _setup(self, pg: ProcessGroup | None, num_shards: int | None, reduce_order: ReduceOrder) -> None:
        if num_shards is None and reduce_order == "backend":  # what simulate() was given holds for the groups inside
            num_shards, reduce_order = getattr(pg, "defaults", (None, reduce_order))
        self._pg = None if pg is None else weakref.ref(pg) if pg is dist.group.WORLD else lambda: pg
        self.rank = 0 if pg is None else dist.get_rank(pg)
        self.world_size = 1 if pg is None else dist.get_world_size(pg)
        if self.rank < 0:
            raise ValueError(f"rank={dist.get_rank()} of the default group is not a member of the given process group")
        self.num_shards = self.world_size if num_shards is None else num_shards
        check_num_shards(self.num_shards, self.world_size)
        if reduce_order not in ("backend", "tree"):
            raise ValueError(f'reduce_order={reduce_order!r} is not "backend" or "tree"')
        self.reduce_order: ReduceOrder = reduce_order if num_shards is None else "tree"

    @classmethod
    def single(cls, num_shards: int | None = None) -> Group:
        """A world of one, whether or not ``torch.distributed`` is initialised."""
        group = cls.__new__(cls)
        group._setup(None, num_shards, "backend")
        return group

    @property
    def pg(self) -> ProcessGroup | None:
        """The process group; None in a world of one. Raises RuntimeError after ``destroy_process_group``.

        The default group is not kept alive: torn down when the interpreter ends, gloo's threads would abort it.
        """
        if self._pg is None:
            return None
        pg = self._pg()
        if pg is None:
            raise RuntimeError("the process group of this Group has ended")
        return pg

    @property
    def shards(self) -> range:
        """The logical shards that live on this rank."""
        return shard_range(self.rank, self.world_size, self.num_shards)

    def split(self, tensor: Tensor, dim: int = 0) -> list[Tensor]:
        """This rank's part of a sharded tensor as one view per logical shard.

        Raises ValueError when its logical shards do not divide the size of ``dim``.
        """
        count = len(self.shards)
        if tensor.shape[dim] % count:
            raise ValueError(f"size {tensor.shape[dim]} of dim {dim} cannot be split into {count} logical shards")
        return [tensor] if count == 1 else list(tensor.chunk(count, dim))

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.pg is not None:
            raise TypeError("a Group belongs to a running process and cannot be pickled; save state_dict() instead")
        return Group.single, (self.num_shards if self.reduce_order == "tree" else None,)

    def __repr__(self) -> str:
        return (
            f"Group(rank={self.rank}, world_size={self.world_size}, num_shards={self.num_shards}, "
            f"reduce_order={self.reduce_order!r})"
        )


def is_group(value: Any) -> TypeGuard[Group]:
    """A Group is known by its methods: ``src`` and ``isoshard`` are two module objects of one class."""
    return hasattr(value, "world_size") and hasattr(value, "num_shards") and hasattr(value, "shards")


def as_group(value: Any, num_shards: int | None = None) -> Group:
    """``value`` (None, a Group, a ProcessGroup or a 1-D DeviceMesh) as a Group.

    Raises ValueError when ``num_shards`` contradicts that of a given Group.
    """
    if not is_group(value):
        return Group(value, num_shards=num_shards)
    if num_shards not in (None, value.num_shards):
        raise ValueError(f"num_shards={num_shards} differs from num_shards={value.num_shards} of the given group")
    return value


def group_or_single(group: Any) -> Group:
    """``group`` as a Group, and a world of one when it is None: a module is never cut up by surprise."""
    return Group.single() if group is None else as_group(group)
