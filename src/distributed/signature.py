"""What one rank asks of a collective, and in which words two ranks disagree about it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .origin import Origin


class Signature(NamedTuple):
    """All that the ranks of a group must agree on. ``tensors`` are dtype and shape, such as ``float32[2, 8]``."""

    op: str
    reduce_op: str | None = None
    root: int | None = None
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        root = () if self.root is None else (f"root={self.root}",)
        return f"{self.op}({', '.join((*filter(None, [self.reduce_op]), *root, *self.tensors))})"


class Call(NamedTuple):
    """One rank's part of a collective, and where it was called."""

    signature: Signature
    origin: Origin
    payload: Any = None
    is_async: bool = False

    def __str__(self) -> str:
        return f"{self.signature} {self.origin}"


def specs(tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """Dtype and shape of each tensor."""
    return tuple([_spec(tensor.dtype, tensor.shape) for tensor in tensors])


@functools.lru_cache(maxsize=4096)
def _spec(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def reduce_op_name(opts: Any) -> str:
    """The name of the reduction that a call's options ask for: SUM, MAX, …"""
    op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
    return _name(getattr(op, "op", op))


@functools.cache
def _name(op: Any) -> str:
    return str(op).rsplit(".", 1)[-1]


def agree(calls: Mapping[int, Call]) -> bool:
    """Whether all ranks ask for the same."""
    first = next(iter(calls.values())).signature
    return all(call.signature is first or call.signature == first for call in calls.values())


def describe_mismatch(calls: Mapping[int, Call], where: str) -> str:
    """The sentence for ranks that do not agree, with a line for each kind of call."""
    return f"mismatched collectives ({where}), {_difference(calls)}:\n{list_calls(calls)}"


def in_opposite_order(before: Mapping[int, Call], after: Mapping[int, Call]) -> bool:
    """Whether of two like asynchronous calls, made one after the other, some ranks made the second first.

    The same call is the same line, or the same expression on another line of the same function. Calls that are waited
    for at once are left alone: in a loop, ranks may well take turns in who comes to which line.
    """
    calls = [*before.values(), *after.values()]
    if not all(call.is_async for call in calls) or not agree(dict(enumerate(calls))):
        return False
    sites = {(before[rank].origin.site, after[rank].origin.site) for rank in before}
    if len(sites) == 1:
        return False
    sources = {(before[rank].origin.source, after[rank].origin.source) for rank in before}
    return any(a != b and (b, a) in pairs for pairs in (sites, sources) for a, b in pairs)


def describe_crossing(before: Mapping[int, Call], after: Mapping[int, Call], first: str, second: str) -> str:
    """The sentence for ranks that called ``first`` and ``second`` in opposite orders."""
    return (
        "collectives in different order on different ranks: each rank met the other call's data\n"
        f"{first}:\n{list_calls(before)}\n{second}:\n{list_calls(after)}"
    )


def list_calls(calls: Mapping[int, Call]) -> str:
    """One line for each group of ranks that call the same from the same place."""
    return "\n".join(f"  {line}" for line in by_text({rank: str(call) for rank, call in calls.items()}))


def by_text(texts: Mapping[int, str]) -> list[str]:
    """``ranks 0, 2: text`` for each text, in the order of their first ranks."""
    ranks: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        ranks.setdefault(text, []).append(rank)
    return [f"{name_ranks(members)}: {text}" for text, members in ranks.items()]


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0, 2-5``."""
    parts: list[str] = []
    start = 0
    for i, rank in enumerate(ranks):
        if i + 1 == len(ranks) or ranks[i + 1] != rank + 1:
            run = ranks[start : i + 1]
            parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
            start = i + 1
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"


def list_members(ranks: Sequence[int]) -> str:
    """All ranks of a group, or the first and the last of many."""
    return str(list(ranks)) if len(ranks) <= 8 else f"[{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}]"


def _difference(calls: Mapping[int, Call]) -> str:
    signatures = [call.signature for call in calls.values()]
    for name, values in (
        ("operations", {s.op for s in signatures}),
        ("reduce-ops", {s.reduce_op for s in signatures}),
        ("roots", {s.root for s in signatures}),
        ("dtypes", {tuple(spec.partition("[")[0] for spec in s.tensors) for s in signatures}),
    ):
        if len(values) > 1:
            return f"different {name}"
    return "different shapes"
