"""Collectives through shared memory. They move bytes, or sum in the order that the backend would: the bits are its own.

Each takes the memory and a tensor that ``serves`` accepts, and returns a new one. Large tensors take several turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..memory import empty
from .reduction import ring_part, tree_sum
from .shared_memory import DTYPES, SLOT_BYTES, SharedMemory

WHOLE_BYTES = 256 * 1024
"""Up to this size every rank of three or more sums the whole message; of a larger one its part, with one more turn."""

RING_BYTES = 24 * 2**20
"""Up to this size gloo's order of three or more terms is known."""

TREE = "SUM by tree"

ORDERS: dict[str, tuple[Callable[..., Tensor], Callable[[Sequence[Tensor], int, int], Tensor]]] = {
    TREE: (torch.add, lambda terms, start, length: tree_sum(terms)),
    "SUM": (torch.add, ring_part),
    "MAX": (torch.maximum, lambda terms, start, length: reduce(torch.maximum, terms)),
    "MIN": (torch.minimum, lambda terms, start, length: reduce(torch.minimum, terms)),
}
"""How two terms and how more of them are reduced, these given where in a tensor of which length they lie."""

OPS = ("all_gather", "broadcast", *(f"{op} {order}" for op in ("all_reduce", "reduce_scatter") for order in ORDERS))


def serves(tensor: Tensor) -> bool:
    """Whether memory is made for ``tensor``."""
    return tensor.is_cpu and type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype in DTYPES


def order(memory: SharedMemory, tensor: Tensor, op: dist.ReduceOp.RedOpType, by_tree: bool) -> str | None:
    """The key in ORDERS that has the backend's bits, or those of the tree; None where those are not known."""
    if by_tree:
        return TREE
    known = op != dist.ReduceOp.SUM or memory.world_size == 2 or tensor.nbytes <= RING_BYTES
    return op.name if known and op.name in ORDERS else None


def all_gather(memory: SharedMemory, tensor: Tensor) -> Tensor:
    """``[*shape] -> [world_size, *shape]``."""
    flat, call = tensor.detach().reshape(-1), _call("all_gather", tensor)
    out = empty(torch.Size([memory.world_size, len(flat)]), flat.dtype)
    with memory:
        for piece in _pieces(len(flat), SLOT_BYTES // flat.element_size()):
            part = flat[piece]
            slots = memory.slots(flat.dtype, len(part))
            slots[memory.rank].copy_(part)
            memory.meet(call, _describe)
            out[:, piece].copy_(slots)
    return out.view(memory.world_size, *tensor.shape)


def broadcast(memory: SharedMemory, tensor: Tensor, src: int) -> Tensor:
    """The tensor of rank ``src``."""
    flat, call = tensor.detach().reshape(-1), _call("broadcast", tensor, src)
    out = empty(flat.shape, flat.dtype)
    with memory:
        for piece in _pieces(len(flat), SLOT_BYTES // flat.element_size()):
            slot = memory.slots(flat.dtype, len(flat[piece]))[src]
            if src == memory.rank:
                slot.copy_(flat[piece])
            memory.meet(call, _describe)
            out[piece].copy_(slot)
    return out.view(tensor.shape)


def reduce_scatter(memory: SharedMemory, slices: Tensor, by_tree: bool) -> Tensor | None:
    """The sum of what the ranks have for this one: ``[world_size, *shape] -> [*shape]``. None as in ``all_reduce``."""
    how = order(memory, slices, dist.ReduceOp.SUM, by_tree)
    if how is None:
        return None
    flat, call = slices.detach().flatten(1), _call(f"reduce_scatter {how}", slices)
    world_size, length = flat.shape
    out = empty(torch.Size([length]), flat.dtype)
    with memory:
        for piece in _pieces(length, SLOT_BYTES // flat.element_size() // world_size):
            part = flat[:, piece]
            slots = memory.slots(flat.dtype, part.numel()).unflatten(1, part.shape)
            slots[memory.rank].copy_(part)
            memory.meet(call, _describe)
            terms = slots[:, memory.rank].unbind(0)
            _reduce(how, terms, out[piece], memory.rank * length + piece.start, flat.numel())
    return out.view(slices.shape[1:])


def all_reduce(memory: SharedMemory, tensor: Tensor, op: dist.ReduceOp.RedOpType, by_tree: bool) -> Tensor | None:
    """The sum of the tensors of all ranks, or what ``op`` says; None where the backend's bits are not known."""
    how = order(memory, tensor, op, by_tree)
    if how is None:
        return None
    flat, call = tensor.detach().reshape(-1), _call(f"all_reduce {how}", tensor)
    out = empty(flat.shape, flat.dtype)
    whole = memory.world_size == 2 or tensor.nbytes <= WHOLE_BYTES
    with memory:
        for piece in _pieces(len(flat), SLOT_BYTES // flat.element_size()):
            part, total = flat[piece], out[piece]
            slots = memory.slots(flat.dtype, len(part))
            slots[memory.rank].copy_(part)
            memory.meet(call, _describe)
            if whole:
                _reduce(how, slots.unbind(0), total, piece.start, len(flat))
            else:
                _share_sums(memory, call, how, slots, total, piece.start, len(flat))
    return out.view(tensor.shape)


def _share_sums(memory: SharedMemory, call: int, how: str, slots: Tensor, out: Tensor, start: int, length: int) -> None:
    """Each rank sums its part of the ``slots`` into those of the next turn, from which all take it."""
    sums = memory.slots(out.dtype, -(-len(out) // memory.world_size))
    ends = [rank * len(out) // memory.world_size for rank in range(memory.world_size + 1)]
    first, last = ends[memory.rank], ends[memory.rank + 1]
    terms = slots[:, first:last].unbind(0)
    _reduce(how, terms, sums[memory.rank, : last - first], start + first, length)
    memory.meet(call, _describe)
    for rank, (first, last) in enumerate(pairwise(ends)):
        out[first:last].copy_(sums[rank, : last - first])


def _reduce(how: str, terms: Sequence[Tensor], out: Tensor, start: int, length: int) -> None:
    """Into ``out``, which lies at ``start`` of a tensor of ``length`` elements."""
    two, more = ORDERS[how]
    if len(terms) == 2:
        two(*terms, out=out)
    else:
        out.copy_(more(terms, start, length))


def _pieces(length: int, most: int) -> Iterator[slice]:
    """Runs of at most ``most`` elements; a single empty one of none, so that ranks meet."""
    for start in range(0, max(length, 1), most):
        yield slice(start, min(start + most, length))


def _call(op: str, tensor: Tensor, root: int = 0) -> int:
    """What ranks must agree on, as a number of 64 bits."""
    return tensor.nbytes << 24 | root << 8 | DTYPES.index(tensor.dtype) << 4 | OPS.index(op)


def _describe(call: int) -> str:
    op, dtype, root, nbytes = OPS[call & 15], DTYPES[call >> 4 & 15], call >> 8 & 0xFFFF, call >> 24
    source = f" from rank {root} of the group" if op == "broadcast" else ""
    return f"{op}{source} of {nbytes} bytes of {str(dtype).removeprefix('torch.')}"
