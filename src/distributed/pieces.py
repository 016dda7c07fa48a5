"""Which shapes each rank sends to, and expects from, each other rank, where a collective moves pieces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Shapes = Mapping[int, list[int]]


@dataclass(frozen=True)
class Pieces:
    """``sends[r]`` goes to rank ``r`` of the group, ``receives[r]`` comes from it."""

    sends: Shapes
    receives: Shapes


def pieces(method: str, args: tuple[Any, ...], root: int | None, size: int) -> Pieces | None:
    """Of a call of ``method`` (a name of torch's process groups) in a group of ``size`` ranks; None: not in pieces."""
    if method == "all_to_all_single":
        output, sent, output_splits, splits = args
        return Pieces(_shapes(_cut(sent, splits, size)), _shapes(_cut(output, output_splits, size)))
    if method == "alltoall":
        return Pieces(_shapes(args[1]), _shapes(args[0]))
    if method == "allgather":
        return Pieces(_shapes(args[1] * size), _shapes(args[0][0]))
    if method == "reduce_scatter":
        return Pieces(_shapes(args[1][0]), _shapes(args[0] * size))
    if method in ("gather", "scatter") and root is not None:
        lists, own = (args[0], args[1]) if method == "gather" else (args[1], args[0])
        one, many = {root: list(own[0].shape)}, _shapes(lists[0] if lists else [])
        return Pieces(one, many) if method == "gather" else Pieces(many, one)
    return None


def misfit(everyone: Sequence[Pieces | None]) -> str | None:
    """What does not fit in the pieces of all ranks of a group, in rank order; None: all fit."""
    for rank, mine in enumerate(everyone):
        for source, expected in ({} if mine is None else mine.receives).items():
            theirs = everyone[source] if source < len(everyone) else None
            sent = None if theirs is None else theirs.sends.get(rank)
            if sent is not None and math.prod(sent) != math.prod(expected):
                return f"{sent} was sent by rank {source} where {expected} is received by rank {rank} of the group"
    return None


def _shapes(tensors: Sequence[Tensor]) -> Shapes:
    return {rank: list(tensor.shape) for rank, tensor in enumerate(tensors)}


def _cut(tensor: Tensor, splits: list[int], size: int) -> list[Tensor]:
    return list(tensor.split(splits or [tensor.shape[0] // size] * size))
