"""Counting what is sent. A ledger is active in the thread that entered it, and nowhere else."""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Phase = Literal["forward", "backward"]
_ledgers: ContextVar[tuple[Ledger, ...]] = ContextVar("isoshard_ledgers", default=())


@dataclass(frozen=True)
class Record:
    """One collective as this rank called it. ``payload_bytes`` is the size of this rank's input."""

    op: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    payload_bytes: int
    phase: Phase


class Ledger:
    """Records the collectives that this rank calls inside the ``with`` block, forward and backward.

    with Ledger() as ledger:
        model(ids).sum().backward()
    assert ledger.count("all_reduce", phase="backward") == 2
    """

    def __init__(self) -> None:
        self.records: list[Record] = []

    def __enter__(self) -> Ledger:
        self._token: Token[tuple[Ledger, ...]] = _ledgers.set((*_ledgers.get(), self))
        return self

    def __exit__(self, *exc: object) -> None:
        _ledgers.reset(self._token)

    def count(self, op: str | None = None, phase: Phase | None = None) -> int:
        """Number of collectives, of one ``op`` and one ``phase`` where given."""
        return sum((op is None or r.op == op) and (phase is None or r.phase == phase) for r in self.records)


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def record(op: str, tensor: Tensor) -> None:
    """Enter a collective into every active ledger."""
    if torch.compiler.is_compiling():
        return
    for ledger in _ledgers.get():
        ledger.records.append(
            Record(op, tensor.dtype, tuple(tensor.shape), tensor.nbytes, "backward" if in_backward() else "forward")
        )
