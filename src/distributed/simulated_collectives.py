"""What each collective does, on the tensors of all ranks at once.

A function gets the arguments of every rank's call, in rank order, and torch's options. Sums have the bits of gloo's
all-reduce. Outputs are copies: no rank ever sees another rank's memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .reduction import ring_sum
from .signature import reduce_op_name

Args = Sequence[tuple[Any, ...]]

_REDUCTIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "SUM": ring_sum,
    "AVG": lambda terms: ring_sum(terms) / len(terms),
    "PRODUCT": functools.partial(functools.reduce, torch.mul),
    "MAX": functools.partial(functools.reduce, torch.maximum),
    "MIN": functools.partial(functools.reduce, torch.minimum),
    "BAND": functools.partial(functools.reduce, torch.bitwise_and),
    "BOR": functools.partial(functools.reduce, torch.bitwise_or),
    "BXOR": functools.partial(functools.reduce, torch.bitwise_xor),
}


def all_reduce(calls: Args, opts: Any) -> None:
    """Each: ``(tensors,)``, in place."""
    for terms in zip(*(tensors for (tensors,) in calls), strict=True):
        _copy_to_all(terms, _reduce(opts, terms))


def reduce(calls: Args, opts: Any) -> None:
    """Each: ``([tensor],)``, in place on the root."""
    ((result,),) = calls[opts.rootRank]
    result.copy_(_reduce(opts, [tensor for ((tensor,),) in calls]))


def broadcast(calls: Args, opts: Any) -> None:
    """Each: ``(tensors,)``."""
    for copies in zip(*(tensors for (tensors,) in calls), strict=True):
        _copy_to_all(copies, copies[opts.rootRank].clone())


def all_gather(calls: Args, opts: Any) -> None:
    """Each: ``([one output per rank], [input])``."""
    for rank, ((outputs,), _) in enumerate(calls):
        _check_count("all_gather", rank, outputs, calls)
        for source, (out, (_, (sent,))) in enumerate(zip(outputs, calls, strict=True)):
            _deliver("all_gather", sent, out, source, rank)


def all_gather_coalesced(calls: Args, opts: Any) -> None:
    """Each: ``(a list of outputs per rank, inputs)``."""
    for rank, (lists, _) in enumerate(calls):
        _check_count("all_gather", rank, lists, calls)
        for source, (outputs, (_, inputs)) in enumerate(zip(lists, calls, strict=True)):
            for out, sent in zip(outputs, inputs, strict=True):
                _deliver("all_gather", sent, out, source, rank)


def all_gather_single(calls: Args, opts: Any) -> None:
    """Each: ``(output, input)``."""
    all_gather_single_coalesced([([output], [sent]) for output, sent in calls], opts)


def all_gather_single_coalesced(calls: Args, opts: Any) -> None:
    """Each: ``(outputs, inputs)``."""
    for i in range(len(calls[0][1])):
        whole = torch.cat([inputs[i].reshape(-1) for _, inputs in calls])
        for rank, (outputs, _) in enumerate(calls):
            _deliver("all_gather", whole, outputs[i], None, rank)


def reduce_scatter(calls: Args, opts: Any) -> None:
    """Each: ``([output], [one input per rank])``."""
    for rank, ((out,), (inputs,)) in enumerate(calls):
        _check_count("reduce_scatter", rank, inputs, calls)
        _deliver("reduce_scatter", _reduce(opts, [sent[rank] for _, (sent,) in calls]), out, None, rank)


def reduce_scatter_single(calls: Args, opts: Any) -> None:
    """Each: ``(output, input)``."""
    reduce_scatter_single_coalesced([([output], [sent]) for output, sent in calls], opts)


def reduce_scatter_single_coalesced(calls: Args, opts: Any) -> None:
    """Each: ``(outputs, inputs)``."""
    for i in range(len(calls[0][1])):
        total = _reduce(opts, [inputs[i].reshape(-1) for _, inputs in calls]).chunk(len(calls))
        for rank, ((outputs, _), share) in enumerate(zip(calls, total, strict=True)):
            _deliver("reduce_scatter", share, outputs[i], None, rank)


def all_to_all(calls: Args, opts: Any) -> None:
    """Each: ``(one output per rank, one input per rank)``."""
    for rank, (outputs, inputs) in enumerate(calls):
        _check_count("all_to_all", rank, outputs, calls)
        _check_count("all_to_all", rank, inputs, calls)
    for rank, (outputs, _) in enumerate(calls):
        for source, (out, (_, inputs)) in enumerate(zip(outputs, calls, strict=True)):
            _deliver("all_to_all", inputs[rank], out, source, rank)


def all_to_all_single(calls: Args, opts: Any) -> None:
    """Each: ``(output, input, output_splits, input_splits)``; no splits are equal ones."""

    def cut(tensor: Tensor, splits: list[int]) -> list[Tensor]:
        return list(tensor.split(splits or [tensor.shape[0] // len(calls)] * len(calls)))

    all_to_all([(cut(out, out_splits), cut(sent, splits)) for out, sent, out_splits, splits in calls], opts)


def gather(calls: Args, opts: Any) -> None:
    """Each: ``([one output per rank] on the root, [input])``."""
    root, outputs = opts.rootRank, calls[opts.rootRank][0][0]
    _check_count("gather", root, outputs, calls)
    for rank, (out, (_, (sent,))) in enumerate(zip(outputs, calls, strict=True)):
        _deliver("gather", sent, out, rank, root)


def scatter(calls: Args, opts: Any) -> None:
    """Each: ``([output], [one input per rank] on the root)``."""
    root, inputs = opts.rootRank, calls[opts.rootRank][1][0]
    _check_count("scatter", root, inputs, calls)
    for rank, (((out,), _), sent) in enumerate(zip(calls, inputs, strict=True)):
        _deliver("scatter", sent, out, root, rank)


ACTIONS: dict[str, Callable[[Args, Any], None]] = {
    "barrier": lambda calls, opts: None,
    "allreduce": all_reduce,
    "allreduce_coalesced": all_reduce,
    "reduce": reduce,
    "broadcast": broadcast,
    "allgather": all_gather,
    "allgather_coalesced": all_gather_coalesced,
    "all_gather_single": all_gather_single,
    "all_gather_single_coalesced": all_gather_single_coalesced,
    "reduce_scatter": reduce_scatter,
    "reduce_scatter_single": reduce_scatter_single,
    "reduce_scatter_single_coalesced": reduce_scatter_single_coalesced,
    "alltoall": all_to_all,
    "all_to_all_single": all_to_all_single,
    "gather": gather,
    "scatter": scatter,
}


def _reduce(opts: Any, terms: Sequence[Tensor]) -> Tensor:
    op = reduce_op_name(opts)
    if op not in _REDUCTIONS:
        raise ValueError(f"reduce-op {op} is not simulated; choose one of {', '.join(_REDUCTIONS)}")
    return _REDUCTIONS[op](list(terms))


def _check_count(name: str, rank: int, tensors: Sequence[Any], calls: Args) -> None:
    if len(tensors) != len(calls):
        raise ValueError(f"{name}: rank {rank} gives {len(tensors)} tensors for {len(calls)} ranks")


def _deliver(name: str, sent: Tensor, out: Tensor, source: int | None, rank: int) -> None:
    if sent.numel() != out.numel():
        whose = "all ranks together" if source is None else f"rank {source}"
        sides = f"{list(sent.shape)} was sent by {whose} where {list(out.shape)} is received by rank {rank}"
        raise ValueError(f"{name}: {sides} of the group")
    out.copy_(sent.reshape(out.shape))


def _copy_to_all(outputs: Sequence[Tensor], value: Tensor) -> None:
    for out in outputs:
        out.copy_(value)
