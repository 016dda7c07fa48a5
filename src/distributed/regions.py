"""Where autograd meets communication: conjugate pairs, each the backward of the other.

    copy_to_region       forward: nothing         backward: all_reduce
    reduce_from_region   forward: all_reduce      backward: nothing
    scatter_to_region    forward: own slice       backward: all_gather
    gather_from_region   forward: all_gather      backward: own slice

and over the sequence, dim 1 (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"):

    gather_to_shards             forward: all_gather       backward: reduce_scatter
    reduce_scatter_from_shards   forward: reduce_scatter   backward: all_gather

The ``_shards`` forms take or give one tensor per logical shard of this rank and sum in the one tree: own shards
first, then across ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sharding import shared_range
from .collectives import all_gather, all_reduce, reduce_scatter
from .group import Group
from .reduction import tree_sum


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, copies: int) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for _ in range(copies))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(tree_sum(grads), group=ctx.group), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *terms: Tensor) -> Tensor:
        ctx.num_terms = len(terms)
        return all_reduce(tree_sum(terms), group=group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *[grad] * ctx.num_terms)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> tuple[Tensor, ...]:
        ctx.group = group
        whole = all_gather(x, group=group, dim=1)
        return tuple(whole.view_as(whole) for _ in group.shards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(tree_sum(grads), group=ctx.group, dim=1), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *terms: Tensor) -> Tensor:
        ctx.group, ctx.num_terms = group, len(terms)
        return reduce_scatter(tree_sum(terms), group=group, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        whole = all_gather(grad, group=ctx.group, dim=1)
        return (None, *[whole] * ctx.num_terms)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return x.chunk(group.world_size, dim)[group.rank].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, group=ctx.group, dim=ctx.dim), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(x, group=group, dim=dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.chunk(ctx.group.world_size, ctx.dim)[ctx.group.rank].contiguous(), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dim: int, *shards: Tensor) -> Tensor:
        ctx.dim, ctx.num_shards = dim, len(shards)
        return torch.cat(shards, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *[_canonical(shard) for shard in grad.chunk(ctx.num_shards, ctx.dim)])


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, replicas: int) -> tuple[Tensor, ...]:
        ctx.group, ctx.replicas = group, replicas
        pieces = shared_range(group.shards, replicas)
        views = [x.chunk(len(pieces))[shard // replicas - pieces.start] for shard in group.shards]
        return tuple(_canonical(view.view_as(view)) for view in views)  # one object each: outputs are told apart by it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        group, local = ctx.group, min(ctx.replicas, len(grads))
        sums = torch.cat([tree_sum(grads[i : i + local]) for i in range(0, len(grads), local)])
        sharers = ctx.replicas // local
        if sharers == 1:
            return sums, None, None
        first = group.rank // sharers * sharers
        terms = all_gather(sums.unsqueeze(0), group=group)[first : first + sharers]
        return tree_sum(terms.unbind(0)), None, None


def copy_to_region(x: Tensor, *, group: Group) -> Tensor:
    """Replicated ``x`` on its way into computation that differs between ranks: gradients are summed over ranks."""
    return x if group.world_size == 1 else _Copy.apply(x, group, 1)[0]  # type: ignore[no-untyped-call]


def copy_to_shards(x: Tensor, *, group: Group) -> list[Tensor]:
    """Replicated ``x``, once per logical shard of this rank: gradients are summed over all V shards."""
    if group.num_shards == 1:
        return [x]
    return list(_Copy.apply(x, group, len(group.shards)))  # type: ignore[no-untyped-call]


def gather_to_shards(x: Tensor, *, group: Group) -> list[Tensor]:
    """This rank's part of a sequence, ``[b, s/w, h]``, to the whole ``[b, s, h]``, once per logical shard.

    Gradients are summed over all V shards, each rank getting those of its part: a reduce-scatter.
    """
    return [x] if group.num_shards == 1 else list(_GatherSequence.apply(x, group))  # type: ignore[no-untyped-call]


def reduce_scatter_from_shards(terms: Sequence[Tensor], *, group: Group) -> Tensor:
    """One partial ``[b, s, h]`` per logical shard to this rank's part ``[b, s/w, h]`` of the sum over all V shards."""
    if group.num_shards == 1:
        return terms[0]
    part: Tensor = _ScatterSequence.apply(group, *terms)  # type: ignore[no-untyped-call]
    return part


def reduce_from_region(x: Tensor, *, group: Group) -> Tensor:
    """Partial ``x`` to its sum over ranks, replicated."""
    return reduce_from_shards([x], group=group)


def reduce_from_shards(terms: Sequence[Tensor], *, group: Group) -> Tensor:
    """One partial tensor per logical shard of this rank to the sum over all V shards, replicated."""
    if len(terms) == 1 and group.world_size == 1:
        return terms[0]
    total: Tensor = _Reduce.apply(group, *terms)  # type: ignore[no-untyped-call]
    return total


def scatter_to_region(x: Tensor, *, group: Group, dim: int = -1) -> Tensor:
    """Replicated ``x`` to this rank's slice of ``dim``.

    Raises ValueError when ``world_size`` does not divide ``x.shape[dim]``.
    """
    if x.shape[dim] % group.world_size:
        raise ValueError(
            f"scatter_to_region: size {x.shape[dim]} of dim {dim} is not divisible by world_size={group.world_size}"
        )
    return x if group.world_size == 1 else _Scatter.apply(x, group, dim)  # type: ignore[no-untyped-call]


def gather_from_region(x: Tensor, *, group: Group, dim: int = -1) -> Tensor:
    """Slices of ``dim`` to the whole, replicated."""
    return x if group.world_size == 1 else _Gather.apply(x, group, dim)  # type: ignore[no-untyped-call]


def split_shards(x: Tensor, *, group: Group, dim: int = -1) -> list[Tensor]:
    """This rank's slice of a sharded tensor, one tensor per logical shard, in the layout it has at ``w = V``."""
    return [x] if len(group.shards) == 1 else [_canonical(shard) for shard in group.split(x, dim)]


def share_shards(x: Tensor, *, group: Group, replicas: int) -> list[Tensor]:
    """Pieces along dim 0, each shared by ``replicas`` logical shards, once per logical shard of this rank.

    The gradient of a piece is the sum over all the shards that share it, on whatever rank, in the fixed tree.
    """
    return list(_Share.apply(x, group, replicas))  # type: ignore[no-untyped-call]


def join_shards(shards: Sequence[Tensor], *, dim: int = -1) -> Tensor:
    """The inverse of ``split_shards``, with gradients in that layout too."""
    if len(shards) == 1:
        return shards[0]
    joined: Tensor = _Join.apply(dim, *shards)  # type: ignore[no-untyped-call]
    return joined


def _canonical(x: Tensor) -> Tensor:
    """``x`` contiguous and aligned like a tensor of its own: matrix kernels choose their path by both.

    A compiled graph has neither addresses nor promised bits.
    """
    if torch.compiler.is_compiling():
        return x.contiguous().view(x.shape)  # an object of its own, which torch 2.11 tells outputs by
    return x if x.is_contiguous() and x.data_ptr() % 64 == 0 else x.clone(memory_format=torch.contiguous_format)
