"""N ranks as N threads of which exactly one runs at a time.

A rank hands over only where it waits for the others or ends. So the order of events is fixed, the state below
needs no lock, and what is global to the process (its random states) can belong to the rank that runs.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .group import ReduceOrder

PATIENCE = 5.0
"""Seconds that interrupted ranks are given to reach their next collective, where they end."""

_LIBRARY = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)


class SimulationError(RuntimeError):
    """A fault of the simulated program, named with its ranks and call sites."""


class RankAborted(SimulationError):
    """Raised in the other ranks after a fault, so that they unwind."""


class ProcessState:
    """What is global to the process but belongs to the rank that runs: random states and the default dtype."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._numpy: Any = np.random.get_state()
        self._python = random.getstate()
        self._dtype = torch.get_default_dtype()

    def restore(self) -> None:
        """Make these the current states of the process."""
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        torch.set_default_dtype(self._dtype)


class RankThread(threading.Thread):
    """The thread of one simulated rank."""

    def __init__(self, lockstep: Lockstep, rank: int, body: Callable[[int], Any]) -> None:
        super().__init__(name=f"simulated rank {rank}", daemon=True)
        self.lockstep, self.rank, self.body = lockstep, rank, body
        self.turn = threading.Semaphore(0)
        self.state = ProcessState()
        self.waits_for: Meeting | None = None
        self.groups_created: dict[tuple[int, ...], int] = {}
        self.ended = False
        self.over = threading.Event()
        self.result: Any = None

    def run(self) -> None:
        self._take_turn()
        try:
            self.result = self.body(self.rank)
        except RankAborted:
            pass
        except BaseException as error:
            self.lockstep.fail(f"rank {self.rank} raised {type(error).__name__}: {error}", error)
        self.ended = True
        self.lockstep.hand_over()
        self.over.set()

    def wait_for(self, meeting: Meeting) -> None:
        """Let the other ranks run until ``meeting`` is complete."""
        if not meeting.complete:
            self.waits_for = meeting
            self.state = ProcessState()
            self.lockstep.hand_over()
            self._take_turn()
            self.waits_for = None
        if not meeting.complete:
            raise RankAborted(f"rank {self.rank} stopped at {meeting.calls[self.rank]}: {self.lockstep.error}")

    def _take_turn(self) -> None:
        self.turn.acquire()
        self.state.restore()


@dataclass(frozen=True)
class Call:
    """One rank's part of a collective: what it asks for, its tensors, and where it was called."""

    signature: tuple[Any, ...]
    payload: Any
    site: str

    def __str__(self) -> str:
        name, *details = self.signature
        return f"{name}({', '.join(map(str, details))}) at {self.site}"


@dataclass
class Meeting:
    """The k-th collective of one group: complete when every member has called it."""

    group: str
    index: int
    members: tuple[int, ...]
    calls: dict[int, Call] = field(default_factory=dict)
    complete: bool = False

    def __str__(self) -> str:
        return f"collective {self.index} of group {self.group} {list(self.members)}"

    def describe(self) -> str:
        """One line per rank that has arrived."""
        return "\n".join(f"  rank {rank}: {call}" for rank, call in sorted(self.calls.items()))


class Lockstep:
    """Runs one body per rank, in turns, and lets ranks meet in collectives."""

    def __init__(self, world_size: int, defaults: tuple[int | None, ReduceOrder] = (None, "backend")) -> None:
        self.world_size, self.defaults = world_size, defaults
        self.error: SimulationError | None = None
        self.threads: list[RankThread] = []
        self._meetings: dict[tuple[str, tuple[int, ...], int], Meeting] = {}
        self._counts: dict[tuple[str, tuple[int, ...], int], int] = {}

    def run(self, body: Callable[[int], Any]) -> list[Any]:
        """``body(rank)`` for every rank; results in rank order. Raises SimulationError if any rank fails."""
        before = ProcessState()
        self.threads = [RankThread(self, rank, body) for rank in range(self.world_size)]
        try:
            for thread in self.threads:
                thread.start()
            self.threads[0].turn.release()
            for thread in self.threads:
                thread.over.wait()
        except BaseException as error:
            self.fail(f"interrupted by {type(error).__name__}", error)
            deadline = time.monotonic() + PATIENCE
            for thread in self.threads:
                thread.over.wait(timeout=max(deadline - time.monotonic(), 0))
            raise
        finally:
            before.restore()
        if self.error is not None:
            raise self.error
        return [thread.result for thread in self.threads]

    def current(self) -> RankThread:
        """The rank that runs. Raises SimulationError in any other thread, and after the end."""
        thread = threading.current_thread()
        if not isinstance(thread, RankThread) or thread.lockstep is not self:
            raise SimulationError(f"collective called from thread {thread.name!r}, which is no rank of this simulation")
        return thread

    def meet(
        self,
        group: str,
        members: tuple[int, ...],
        signature: tuple[Any, ...],
        payload: Any,
        action: Callable[[list[Any]], None],
    ) -> Meeting:
        """Join this rank's next collective of ``group``; the last to arrive runs ``action`` on all payloads."""
        me = self.current().rank
        call = Call(signature, payload, _call_site())
        if self.error is not None:
            raise RankAborted(f"rank {me} stopped at {call}: {self.error}")
        index = self._counts[group, members, me] = self._counts.get((group, members, me), 0) + 1
        meeting = self._meetings.setdefault((group, members, index), Meeting(group, index, members))
        meeting.calls[me] = call
        if any(other.signature != signature for other in meeting.calls.values()):
            raise self.fail(f"mismatched collectives ({meeting}):\n{meeting.describe()}")
        if len(meeting.calls) == len(members):
            del self._meetings[group, members, index]
            with torch.no_grad():
                action([meeting.calls[rank].payload for rank in members])
            meeting.complete = True
        return meeting

    def fail(self, message: str, cause: BaseException | None = None) -> SimulationError:
        """Note the first fault; from now on every rank that waits is woken to unwind."""
        if self.error is None:
            self.error = SimulationError(message)
            self.error.__cause__ = cause
        return self.error

    def hand_over(self) -> None:
        """Give the turn to the next rank that can run; when none can, all that wait are told why."""
        me = self.current().rank
        alive = [t for t in (*self.threads[me + 1 :], *self.threads[: me + 1]) if not t.ended]
        if alive and self.error is None and not any(self._can_run(t) for t in alive):
            self.fail(self._deadlock(alive))
        for thread in alive:
            if self.error is not None or self._can_run(thread):
                thread.turn.release()
                return

    def _can_run(self, thread: RankThread) -> bool:
        return thread.waits_for is None or thread.waits_for.complete

    def _deadlock(self, alive: list[RankThread]) -> str:
        lines = []
        for thread in sorted(alive, key=lambda t: t.rank):
            meeting = thread.waits_for
            assert meeting is not None
            missing = [rank for rank in meeting.members if rank not in meeting.calls]
            lines.append(f"  rank {thread.rank}: {meeting.calls[thread.rank]}; {meeting} lacks ranks {missing}")
        returned = [thread.rank for thread in self.threads if thread.ended]
        ended = f"; ranks {returned} have already returned" if returned else ""
        return f"deadlock: every running rank waits{ended}\n" + "\n".join(lines)


def _call_site() -> str:
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith(_LIBRARY) and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
