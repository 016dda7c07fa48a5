"""Raw collectives: no gradient, no change to their input, one door through which every one of them passes.

Each takes a contiguous or strided tensor and returns a new one. In a world of one they return their input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..sharding import check_rank
from . import shared_collectives, shared_memory
from .failure import explain, names_faults
from .group import Group
from .ledger import record, record_wait
from .reduction import tree_sum
from .signature import specs

GATHER_BYTES = 256 * 1024
"""Tree sums of messages up to this size gather all terms; larger ones move the bytes of a ring. Same bits."""

# torch 2.13 renamed these calls and warns at the old names.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: Tensor, *, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce over the ranks, every rank getting the result; sums are taken in ``group.reduce_order``."""
    if group.world_size == 1:
        return tensor
    others = group.world_size - 1
    sums = op is dist.ReduceOp.SUM or op == dist.ReduceOp.SUM  # torch 2.11 traces the first one only
    by_tree = sums and group.reduce_order == "tree"
    gathers = by_tree and tensor.nbytes <= GATHER_BYTES
    record("all_reduce", tensor, group.world_size, 1.0 * others if gathers else 2.0 * others / group.world_size)
    shared = _shared("all_reduce", tensor, group, shared_collectives.all_reduce, tensor, op, by_tree)
    if shared is not None:
        return shared
    if by_tree:
        return _tree_all_reduce(tensor, group)
    out = tensor.clone(memory_format=torch.contiguous_format)
    _call("all_reduce", tensor, group, dist.all_reduce, out, op=op)
    return _traceable(out)


def all_gather(tensor: Tensor, *, group: Group, dim: int = 0) -> Tensor:
    """Concatenate equally shaped tensors of all ranks along ``dim``, in rank order."""
    if group.world_size == 1:
        return tensor
    record("all_gather", tensor, group.world_size, group.world_size - 1)
    parts = _gather_parts(tensor, group)
    return parts.flatten(0, 1) if dim == 0 else torch.cat(parts.unbind(0), dim)


def reduce_scatter(tensor: Tensor, *, group: Group, dim: int = 0) -> Tensor:
    """Sum over the ranks in ``group.reduce_order``, rank ``r`` getting the ``r``-th of ``world_size`` equal slices.

    Raises ValueError when ``world_size`` does not divide ``tensor.shape[dim]``.
    """
    if group.world_size == 1:
        return tensor
    slices = _cut(tensor, group, dim)
    record("reduce_scatter", tensor, group.world_size, 1 - 1 / group.world_size)
    by_tree = group.reduce_order == "tree"
    shared = _shared("reduce_scatter", tensor, group, shared_collectives.reduce_scatter, slices, by_tree)
    if shared is not None:
        return shared
    if by_tree:
        return tree_sum(_exchange(slices, group).unbind(0))
    out = torch.empty_like(slices[0])
    _call("reduce_scatter", tensor, group, _reduce_scatter_flat, out.view(-1), slices.view(-1))
    return _traceable(out)


def start_all_reduce(tensor: Tensor, *, group: Group) -> Callable[[], Tensor]:
    """Begin to sum over the ranks; the function that comes back waits, and gives what ``all_reduce`` gives, bit by bit.

    ``tensor`` is copied first. What goes through shared memory is summed at once, several times faster than by gloo on
    the side, and so are messages of at most ``GATHER_BYTES`` in tree order; of larger ones the exchange runs meanwhile,
    sums and gathering follow the wait.
    """
    if sums_at_once(tensor, group=group):
        total = all_reduce(tensor, group=group)
        return lambda: total
    by_tree = group.reduce_order == "tree"
    entries = record("all_reduce", tensor, group.world_size, 2 - 2 / group.world_size, "started")
    if by_tree:
        wait = _start_exchange(_even_slices(tensor, group), tensor, group)
    else:
        out = tensor.clone(memory_format=torch.contiguous_format)
        wait = _start("all_reduce", tensor, group, out, dist.all_reduce, out)

    def finish() -> Tensor:
        received = wait()
        record_wait(entries)
        return _gather_slices(tree_sum(received.unbind(0)), tensor, group) if by_tree else received

    return finish


def sums_at_once(tensor: Tensor, *, group: Group) -> bool:
    """Whether ``start_all_reduce`` ends the sum before it returns: by size, dtype and place, alike on every rank."""
    small = group.reduce_order == "tree" and tensor.nbytes <= GATHER_BYTES
    return group.world_size == 1 or small or _sums_in_memory("all_reduce", tensor, group)


def start_reduce_scatter(tensor: Tensor, *, group: Group, dim: int = 0) -> Callable[[], Tensor]:
    """Begin a ``reduce_scatter``; the function that comes back waits, and gives its result, bit by bit."""
    if group.world_size == 1 or _sums_in_memory("reduce_scatter", tensor, group):
        part = reduce_scatter(tensor, group=group, dim=dim)
        return lambda: part
    slices = _cut(tensor, group, dim)
    entries = record("reduce_scatter", tensor, group.world_size, 1 - 1 / group.world_size, "started")
    by_tree = group.reduce_order == "tree"
    if by_tree:
        wait = _start_exchange(slices, tensor, group)
    else:
        out = torch.empty_like(slices[0])
        wait = _start("reduce_scatter", tensor, group, out, _reduce_scatter_flat, out.view(-1), slices.view(-1))

    def finish() -> Tensor:
        received = wait()
        record_wait(entries)
        return tree_sum(received.unbind(0)) if by_tree else received

    return finish


def broadcast(tensor: Tensor, *, group: Group, src: int = 0) -> Tensor:
    """The tensor of group rank ``src``, on every rank. Raises ValueError when there is no such rank."""
    check_rank(src, group.world_size, name="src")
    if group.world_size == 1:
        return tensor
    record("broadcast", tensor, group.world_size, 1 - 1 / group.world_size)
    shared = _shared("broadcast", tensor, group, shared_collectives.broadcast, tensor, src)
    if shared is not None:
        return shared
    out = tensor.clone(memory_format=torch.contiguous_format)
    _call("broadcast", tensor, group, dist.broadcast, out, group_src=src)
    return _traceable(out)


def barrier(group: Group) -> None:
    """Wait until every rank of ``group`` has arrived."""
    if group.world_size > 1:
        nothing = torch.empty(0)
        record("barrier", nothing, group.world_size, 0)
        _call("barrier", nothing, group, dist.barrier)


def _call(name: str, tensor: Tensor, group: Group, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``function(*args, group=…)``; when it fails among real processes, the error names the missing ranks."""
    if torch.compiler.is_compiling():
        return function(*args, group=group.pg, **options)
    try:
        return function(*args, group=group.pg, **options)
    except RuntimeError as error:
        if names_faults(group.pg):
            raise
        raise explain(error, f"{name}({', '.join(specs([tensor]))})", group) from error


def _traceable(out: Tensor) -> Tensor:
    """``out``, written in place: when a compiled autograd.Function returns it itself, torch 2.11 loses the gradient."""
    return out.view(out.shape) if torch.compiler.is_compiling() else out


DOOR = _call.__code__
"""The code in which a rank waits for others."""


def _start(
    name: str, tensor: Tensor, group: Group, out: Tensor, function: Callable[..., Any], *args: Any
) -> Callable[[], Tensor]:
    """The same without waiting; the function that comes back waits and gives ``out``."""
    work = _call(name, tensor, group, function, *args, async_op=True)

    def wait(group: Any) -> Tensor:
        work.wait()
        return out

    return lambda: _call(name, tensor, group, wait)


def _cut(tensor: Tensor, group: Group, dim: int) -> Tensor:
    """``world_size`` equal slices of ``dim``, stacked."""
    if tensor.shape[dim] % group.world_size:
        raise ValueError(
            f"reduce_scatter: size {tensor.shape[dim]} of dim {dim} is not divisible by world_size={group.world_size}"
        )
    return torch.stack(tensor.chunk(group.world_size, dim))


def _shared(name: str, tensor: Tensor, group: Group, function: Callable[..., Any], *args: Any) -> Tensor | None:
    """``function(memory, *args)`` where ranks share memory that serves ``tensor``; None: the backend is to do it."""
    if torch.compiler.is_compiling() or not shared_collectives.serves(tensor):
        return None

    def through_memory(group: Any) -> Any:
        memory = shared_memory.of(group)
        return None if memory is None else function(memory, *args)

    out: Tensor | None = _call(name, tensor, group, through_memory)
    return out


def _sums_in_memory(name: str, tensor: Tensor, group: Group) -> bool:
    """Whether ``_shared`` will sum ``tensor`` there: the ranks share memory, and the order of its terms is known."""

    def served(memory: shared_memory.SharedMemory) -> Tensor | None:
        by_tree = group.reduce_order == "tree"
        return None if shared_collectives.order(memory, tensor, dist.ReduceOp.SUM, by_tree) is None else tensor

    return _shared(name, tensor, group, served) is not None


def _gather_parts(tensor: Tensor, group: Group) -> Tensor:
    """``[*shape] -> [world_size, *shape]``."""
    shared = _shared("all_gather", tensor, group, shared_collectives.all_gather, tensor)
    if shared is not None:
        return shared
    flat = tensor.contiguous().view(-1)
    out = flat.new_empty(group.world_size * flat.numel())
    _call("all_gather", tensor, group, _all_gather_flat, out, flat)
    return out.view(group.world_size, *tensor.shape)


def _exchange(slices: Tensor, group: Group) -> Tensor:
    """``[world_size, *shape]``, entry ``r`` for rank ``r`` -> ``[world_size, *shape]``, entry ``r`` from rank ``r``."""
    out = torch.empty_like(slices)
    _call("all_to_all", slices, group, dist.all_to_all_single, out.view(-1), slices.view(-1))
    return out


def _start_exchange(slices: Tensor, tensor: Tensor, group: Group) -> Callable[[], Tensor]:
    out = torch.empty_like(slices)
    return _start("all_to_all", tensor, group, out, dist.all_to_all_single, out.view(-1), slices.view(-1))


def _tree_all_reduce(tensor: Tensor, group: Group) -> Tensor:
    if tensor.nbytes <= GATHER_BYTES:
        return tree_sum(_gather_parts(tensor, group).unbind(0))
    return _gather_slices(tree_sum(_exchange(_even_slices(tensor, group), group).unbind(0)), tensor, group)


def _even_slices(tensor: Tensor, group: Group) -> Tensor:
    """All elements in ``world_size`` rows, the last ones filled up with zeros."""
    length = tensor.numel()
    slices = tensor.new_zeros(group.world_size, -(-length // group.world_size))
    slices.view(-1)[:length] = tensor.reshape(-1)
    return slices


def _gather_slices(total: Tensor, like: Tensor, group: Group) -> Tensor:
    """The inverse of ``_even_slices``, each rank giving its row."""
    return _gather_parts(total, group).view(-1)[: like.numel()].view(like.shape)
