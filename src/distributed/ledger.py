"""Counting what is sent. A ledger is active in the thread that entered it, and nowhere else.

Bytes on the wire are those that one of ``w`` ranks sends by the ring algorithms (Patarasuk and Yuan, 2009), for a
payload of S bytes: all-reduce 2 (w - 1) / w S, all-gather (w - 1) S, reduce-scatter and broadcast (w - 1) / w S; a
small all-reduce in tree order gathers all terms, (w - 1) S.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .ledger_table import Row, text_table
from .origin import ModuleTracker, Phase
from .prediction import Estimate, Link, Transfer, estimate

_ledgers: ContextVar[tuple[Ledger, ...]] = ContextVar("isoshard_ledgers", default=())


@dataclass(frozen=True)
class Record:
    """One collective as this rank called it, in a group of ``world_size``.

    ``payload_bytes`` is the size of this rank's input, ``wire_bytes`` what this rank sends.
    """

    op: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    payload_bytes: int
    wire_bytes: int
    world_size: int
    module: str
    site: str
    phase: Phase

    @property
    def transfer(self) -> Transfer:
        """The same collective at any number of ranks, of an all-gather the whole result.

        The bytes on the wire tell an all-reduce that gathers all terms from a ring, but not between two ranks: those
        are taken as rings.
        """
        gathers = self.world_size > 2 and self.wire_bytes == (self.world_size - 1) * self.payload_bytes > 0
        size = self.payload_bytes * (self.world_size if self.op == "all_gather" else 1)
        return Transfer(self.op, size, gathers and self.op == "all_reduce")


@dataclass(frozen=True)
class Event:
    """What became of a recorded collective: called and done at once, or started, and later waited for."""

    kind: Literal["called", "started", "waited"]
    record: Record


class Ledger:
    """Records the collectives that this rank calls inside the ``with`` block, forward and backward.

        with Ledger() as ledger:
            model(ids).sum().backward()
        assert ledger.count("all_reduce", phase="backward") == 2

    ``records`` are in the order of the calls. ``events`` tell when those that run beside other work were started and
    waited for. Ledgers nest; each belongs to the rank that entered it.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.events: list[Event] = []
        self._modules = ModuleTracker()

    def __enter__(self) -> Ledger:
        self._token: Token[tuple[Ledger, ...]] = _ledgers.set((*_ledgers.get(), self))
        # Backward on a GPU runs in a thread of its own, where this ledger would not be seen.
        self._one_thread: Any = torch.autograd.set_multithreading_enabled(False)
        self._modules.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._modules.stop()
        self._one_thread.__exit__(*exc)
        _ledgers.reset(self._token)

    def count(self, op: str | None = None, phase: Phase | None = None, module: str | None = None) -> int:
        """Number of collectives, of one ``op``, ``phase`` and ``module`` (or modules below it) where given."""
        return sum(
            (op is None or r.op == op)
            and (phase is None or r.phase == phase)
            and (module is None or r.module == module or r.module.startswith(f"{module}."))
            for r in self.records
        )

    def table(self) -> str:
        """Count, payload and bytes on the wire by module, phase and op, then in total; similar layers in one row."""
        return text_table(Row(r.module, r.phase, r.op, 1, r.payload_bytes, r.wire_bytes) for r in self.records)

    __str__ = table

    def predict(self, links: Sequence[Link], sizes: Sequence[int] = (8, 64, 512)) -> list[Estimate]:
        """An estimate for a group of each size in ``sizes`` of the seconds that all recorded collectives would take.

        ``links`` are the levels of the machine from the inside out. ``prediction.FORMULA`` says how, and what is taken
        for granted. Raises ValueError for links that cannot join a group of such a size.
        """
        transfers = [record.transfer for record in self.records]
        return [estimate(transfers, links, size) for size in sizes]

    def add(self, op: str, tensor: Tensor, world_size: int, wire: float, kind: Literal["called", "started"]) -> Record:
        """Enter one collective, of which this rank sends ``wire`` times the size of ``tensor``."""
        origin = self._modules.origin()
        entry = Record(
            op,
            tensor.dtype,
            tuple(tensor.shape),
            tensor.nbytes,
            round(wire * tensor.nbytes),
            world_size,
            origin.module,
            origin.site,
            origin.phase,
        )
        self.records.append(entry)
        self.events.append(Event(kind, entry))
        return entry


Entries = Sequence[tuple[Ledger, Record]]
"""One collective in every ledger that was active when it was called."""


def record(
    op: str, tensor: Tensor, world_size: int, wire: float, kind: Literal["called", "started"] = "called"
) -> Entries:
    """Enter a collective into every active ledger."""
    if torch.compiler.is_compiling():
        return ()
    return [(ledger, ledger.add(op, tensor, world_size, wire, kind)) for ledger in _ledgers.get()]


def record_wait(entries: Entries) -> None:
    """Note that a collective that was started has been waited for."""
    for ledger, entry in entries:
        ledger.events.append(Event("waited", entry))
