"""N ranks as N threads of which exactly one runs at a time.

A rank hands over only where it waits for the others or ends. So the order of events is fixed, the state below
needs no lock, and what is global to the process (its random states) can belong to the rank that runs.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import faults
from .group import ReduceOrder
from .in_flight import InFlight
from .meeting import Action, Key, Meeting, Meetings, Message, Waitable
from .origin import ModuleTracker, call_site, importing
from .rank_state import RankState
from .signature import Call, Signature, agree

PATIENCE = 5.0
"""Seconds that interrupted ranks are given to unwind."""

SIGNALS_EVERY = 0.5
"""Seconds between two looks for signals: one that came just before the main thread went to sleep does not wake it."""

IDLE_POLLS = 100
"""Times that each rank may ask whether a call is complete while nothing happens; then it asks for ever."""


class SimulationError(RuntimeError):
    """A fault of the simulated program, named with its ranks and call sites; ``rank`` is where it was noticed."""

    rank: int | None = None


class RankAborted(SimulationError):
    """Raised in the other ranks after a fault, so that they unwind."""


class RankThread(threading.Thread):
    """The thread of one simulated rank."""

    def __init__(self, lockstep: Lockstep, rank: int, body: Callable[[int], Any], state: RankState) -> None:
        super().__init__(name=f"simulated rank {rank}", daemon=True)
        self.lockstep, self.rank, self.body, self.state = lockstep, rank, body, state
        self.turn = threading.Lock()
        self.turn.acquire()
        self.waits_for: Waitable | None = None
        self.polls: Waitable | None = None
        self.last_call: Call | None = None
        self.in_flight = InFlight(lockstep.read_too_early)
        self.groups_created: dict[tuple[int, ...], int] = {}
        self.ended = False
        self.over = threading.Event()
        self.result: Any = None

    def run(self) -> None:
        self._take_turn()
        try:
            if self.lockstep.error is None:
                self.result = self.body(self.rank)
        except RankAborted:
            pass
        except BaseException as error:
            self.lockstep.fail(faults.raised(self.rank, error, self.lockstep.threads), error)
        self.ended = True
        self.state.save()
        self.lockstep.hand_over(self)
        self.over.set()

    def wait_for(self, what: Waitable) -> None:
        """Let the other ranks run until ``what`` is complete."""
        if not what.complete:
            self.waits_for = what
            self.yield_turn()
            self.waits_for = None
        if not what.complete:
            raise RankAborted(f"rank {self.rank} stopped at {what.waiting(self.rank)}: {self.lockstep.error}")

    def poll(self, what: Waitable) -> bool:
        """Whether ``what`` is complete; if not, the others run for a while."""
        if not what.complete:
            self.polls = what
            self.lockstep.note_poll()
            self.yield_turn()
            self.polls = None
            if self.lockstep.error is not None:
                raise RankAborted(f"rank {self.rank} stopped: {self.lockstep.error}")
        return what.complete

    def yield_turn(self) -> None:
        """Let other ranks run, and come back."""
        self.state.save()
        self.lockstep.hand_over(self)
        self._take_turn()

    def _take_turn(self) -> None:
        self.turn.acquire()
        before, self.lockstep.running = self.lockstep.running, self
        if before is not self:
            self.state.restore(None if before is None else before.state)


class Lockstep:
    """Runs one body per rank, in turns, and lets ranks meet.

    ``schedule`` chooses the next rank, and hands over at every call, too; None is the order of ranks.
    """

    def __init__(
        self,
        world_size: int,
        defaults: tuple[int | None, ReduceOrder] = (None, "backend"),
        schedule: random.Random | None = None,
    ) -> None:
        self.world_size, self.defaults, self.schedule = world_size, defaults, schedule
        self.error: SimulationError | None = None
        self.threads: list[RankThread] = []
        self.running: RankThread | None = None
        self.modules = ModuleTracker()
        self.store: dict[str, bytes] = {}
        self._meetings = Meetings()
        self._idle_polls = 0
        self._process = os.getpid()

    def run(self, body: Callable[[int], Any], states: Sequence[RankState] | None = None) -> list[Any]:
        """``body(rank)`` for every rank; results in rank order. Raises SimulationError if any rank fails."""
        before = RankState()
        states = states or [RankState() for _ in range(self.world_size)]
        self.threads = [RankThread(self, rank, body, state) for rank, state in enumerate(states)]
        self.modules.start()
        try:
            for thread in self.threads:
                thread.start()
            first = self._next(0)
            assert first is not None
            first.turn.release()
            for thread in self.threads:
                while not thread.over.wait(SIGNALS_EVERY):
                    pass
                thread.join()
        except BaseException as error:
            self._interrupt(error)
            raise
        finally:
            self.modules.stop()
            before.restore()
        if self.error is None and (left := self._meetings.unfinished()):
            self.fail(faults.left_open(left))
        if self.error is not None:
            raise self.error
        return [thread.result for thread in self.threads]

    def current(self, what: str = "collective") -> RankThread:
        """The rank that runs. Raises SimulationError in any other thread or process, and after the end."""
        thread = threading.current_thread()
        if isinstance(thread, RankThread) and thread.lockstep is self and os.getpid() == self._process:
            return thread
        text = f"{what} called from thread {thread.name!r}, which is no rank of this simulation, at {call_site()}"
        if os.getpid() != self._process:
            raise SimulationError(f"{what} called in a child process of a simulated rank, at {call_site()}")
        if self.running is not None and not self.running.ended:
            self.fail(f"{text}; rank {self.running.rank} was running")
        raise SimulationError(text)

    def call(
        self,
        thread: RankThread,
        signature: Signature,
        payload: Any,
        buffers: tuple[Sequence[Tensor], Sequence[Tensor]],
        is_async: bool,
    ) -> Call:
        """What ``thread`` is about to do, with the tensors that it writes and reads.

        Raises RankAborted after a fault, SimulationError where it would hang or uses buffers that are in flight.
        """
        call = Call(signature, self.modules.origin(), payload, is_async)
        if self.error is not None:
            raise RankAborted(f"rank {thread.rank} stopped at {call}: {self.error}")
        if importing():
            raise self.fail(
                f"rank {thread.rank}: {call}, while a module is being imported; other ranks would wait for the "
                "import lock for ever. Call it from a function that runs after the imports"
            )
        if not thread.in_flight.empty:
            for tensors, by_writing in zip(buffers, (True, False), strict=True):
                for tensor in tensors:
                    thread.in_flight.check(tensor, by_writing, str(signature))
        thread.last_call = call
        self._idle_polls = 0
        return call

    def meet(self, thread: RankThread, key: Key, call: Call, action: Action) -> Meeting:
        """``thread`` joins its next collective of a group; the last to arrive runs ``action`` on all payloads."""
        meeting = self._meetings.join(key, thread.rank, call)
        if len(meeting.calls) == len(meeting.members):
            self._complete(key, meeting, action)
        self._preempt(thread)
        return meeting

    def send_or_receive(self, thread: RankThread, key: Key, message: Message) -> None:
        """``thread`` posts one side of a message, a list of tensors that is copied when both sides are there."""
        found = self._meetings.post(key, message)
        if found is not None:
            sent, received = (message, found) if message.sends else (found, message)
            if sent.call.signature.tensors != received.call.signature.tensors:
                raise self.fail(faults.mismatched_message(sent, received))
            with torch.no_grad():
                for out, tensor in zip(received.call.payload, sent.call.payload, strict=True):
                    out.copy_(tensor)
            received.peer = sent.rank
            sent.complete = received.complete = True
        self._preempt(thread)

    def fail(self, message: str, cause: BaseException | None = None) -> SimulationError:
        """Note the first fault; from now on every rank that waits is woken to unwind."""
        if self.error is None:
            self.error = SimulationError(message)
            self.error.__cause__ = cause
            thread = threading.current_thread()
            self.error.rank = thread.rank if isinstance(thread, RankThread) else None
        return self.error

    def read_too_early(self, call: Call, operator: str) -> None:
        """A rank used a tensor that a collective it has not waited for still writes."""
        rank = self.current().rank
        raise self.fail(
            f"rank {rank}: {operator} at {call_site()} uses a buffer of {call.signature} before wait():\n"
            f"  rank {rank}: {call}"
        )

    def note_poll(self) -> None:
        """Count questions that got no for an answer; too many, with nothing else going on, are a deadlock."""
        self._idle_polls += 1
        alive = [thread for thread in self.threads if not thread.ended]
        if self._idle_polls > IDLE_POLLS * len(alive) and self.error is None:
            self.fail(faults.deadlock(self.threads, self._meetings.disagreeing()))

    def hand_over(self, thread: RankThread) -> None:
        """Give the turn to the next rank after ``thread`` that can run; when none can, all that wait are told why."""
        found = self._next(thread.rank + 1)
        if found is None and not all(other.ended for other in self.threads):
            self.fail(faults.deadlock(self.threads, self._meetings.disagreeing()))
            found = self._next(thread.rank + 1)
        if found is not None:
            found.turn.release()

    def _next(self, first: int) -> RankThread | None:
        ready = (
            thread for i in range(self.world_size) if self._ready(thread := self.threads[first + i - self.world_size])
        )
        if self.schedule is None:
            return next(ready, None)
        choice = list(ready)
        return self.schedule.choice(choice) if choice else None

    def _ready(self, thread: RankThread) -> bool:
        if thread.ended:
            return False
        return self.error is not None or thread.waits_for is None or thread.waits_for.complete

    def _preempt(self, thread: RankThread) -> None:
        if self.schedule is not None and self.schedule.random() < 0.5:
            thread.yield_turn()

    def _complete(self, key: Key, meeting: Meeting, action: Action) -> None:
        if not agree(meeting.calls):
            raise self.fail(faults.mismatch(meeting))
        before = self._meetings.crossed(key, meeting)
        if before is not None:
            raise self.fail(faults.crossed(before, meeting))
        try:
            with torch.no_grad():
                action([meeting.calls[rank].payload for rank in meeting.members])
        except Exception as error:
            raise self.fail(faults.impossible(meeting, error), error) from error
        meeting.complete = True

    def _interrupt(self, error: BaseException) -> None:
        """End all ranks: those that wait are woken, and one that computes is made to raise."""
        running = self.running
        where = "" if running is None or running.ended else f" while {faults.whereabouts(running)}"
        self.fail(f"interrupted by {type(error).__name__}{where}", error)
        deadline = time.monotonic() + PATIENCE
        if running is not None and running.ident is not None and not running.over.wait(PATIENCE / 5):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(running.ident), ctypes.py_object(RankAborted))
        for thread in self.threads:
            thread.over.wait(timeout=max(deadline - time.monotonic(), 0))
        if where and not isinstance(error, KeyboardInterrupt):
            error.add_note(f"rank {where.removeprefix(' while rank ')}")
