"""Memory that the processes of one host share, in which the ranks of a group take turns.

Each rank has two slots. For turn ``t`` it writes into its slot ``t % 2``, sets its counter to ``t``, waits until all
counters have come to ``t``, and reads the others' slots. A slot that is written again is read by nobody any more: a
rank that has come to ``t - 1`` has done with ``t - 2``. On x86-64 stores become visible in the order of the program,
and loads are made in it, so that counters need no fences; other processors are left to the backend.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .failure import timeout_of

if sys.platform == "linux":
    import fcntl

SLOT_BYTES = 2**20
"""What a rank writes in one turn."""

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8),
)
"""Those that gloo reduces. Others are left to it."""

FUTEX = 202
"""The number of this call on x86-64."""

LINE = 64 // 8
"""Words of a rank's own cache line: its counter, then what it calls in even and in odd turns."""

SPINS, SPINS_CROWDED = 1000, 20
"""How often a rank looks for another before it sleeps: some 0.1 ms, and less where ranks are more than processors."""

LOOK = 0.02
"""Seconds after which a sleeping rank makes sure that the other is alive."""

ELSEWHERE = "it may be in a collective of torch.distributed, which meets this one only with init(shared_memory=False)"
"""Why a rank that is alive may not come."""

# A ProcessGroup takes no attributes.
_opened: weakref.WeakKeyDictionary[Any, SharedMemory | None] = weakref.WeakKeyDictionary()
_declined: weakref.WeakSet[Any] = weakref.WeakSet()


class SharedMemory:
    """What the ranks of ``pg`` share: a file ``fd`` of ``_size(world_size)`` bytes, which this object closes.

    A rank holds a lock on one byte of the file for as long as it takes part; the system frees the lock when the process
    ends, however it ends. Used as a context round each collective: an error in there ends this rank's part.
    """

    def __init__(self, pg: dist.ProcessGroup, fd: int) -> None:
        self._pg, self.fd = weakref.ref(pg), fd
        self._leave = weakref.finalize(self, os.close, fd)
        self.rank, self.world_size = dist.get_rank(pg), dist.get_world_size(pg)
        self._ranks = dist.get_process_group_ranks(pg)
        self._others = [rank for rank in range(self.world_size) if rank != self.rank]
        memory, slots_at = mmap.mmap(fd, _size(self.world_size)), _slots_at(self.world_size)
        self._words = memoryview(memory)[:slots_at].cast("Q")
        with torch.inference_mode(False):
            slots = torch.frombuffer(memory, dtype=torch.uint8, offset=slots_at).view(2, self.world_size, SLOT_BYTES)
            self._slots = {dtype: slots.view(dtype).unbind(0) for dtype in DTYPES}
        self._futex = _Futex(memory)
        self._spins = SPINS if self.world_size <= len(os.sched_getaffinity(0)) else SPINS_CROWDED
        self._turn = 1
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self.rank)

    def __enter__(self) -> None:
        if not self._leave.alive:
            raise RuntimeError("an earlier collective of this group has failed")

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            self._leave()

    def slots(self, dtype: torch.dtype, length: int) -> Tensor:
        """``[world_size, length]``: the memory of the turn to come, of which this rank writes its own row."""
        return self._slots[dtype][self._turn % 2][:, :length]

    def meet(self, call: int, words_for: Callable[[int], str]) -> None:
        """End this rank's writing and wait until all have ended theirs: then they may read.

        Raises RuntimeError when a rank ends, does not come within the timeout of the group, or is in another ``call``,
        which ``words_for`` puts in words.
        """
        turn, words = self._turn, self._words
        words[LINE * self.rank + 1 + turn % 2] = call
        words[LINE * self.rank] = turn
        self._futex.wake(LINE * 8 * self.rank)
        for rank in self._others:
            if words[LINE * rank] < turn:
                self._wait(rank, turn)
            theirs = words[LINE * rank + 1 + turn % 2]
            if theirs != call:
                sides = f"rank {self._ranks[self.rank]} is in {words_for(call)}"
                raise RuntimeError(f"{sides}, rank {self._ranks[rank]} in {words_for(theirs)}")
        self._turn = turn + 1

    def _wait(self, rank: int, turn: int) -> None:
        for _ in range(self._spins):
            if self._words[LINE * rank] >= turn:
                return
        pg = self._pg()
        assert pg is not None
        seconds = timeout_of(pg).total_seconds()
        deadline = time.monotonic() + seconds
        while (seen := self._words[LINE * rank]) < turn:
            if self._futex.wait(LINE * 8 * rank, seen):
                continue
            if self._has_left(rank) and self._words[LINE * rank] < turn:
                raise RuntimeError(f"rank {self._ranks[rank]} has left the memory of this group")
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {self._ranks[rank]} did not come within {seconds:g} s; {ELSEWHERE}")

    def _has_left(self, rank: int) -> bool:
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, rank)
        return True


class _Futex:
    """The system's wait for a word of memory that processes share, by its offset."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._call = ctypes.CDLL(None).syscall
        self._call.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p]
        self._memory = ctypes.c_char.from_buffer(memory)
        self._start = ctypes.addressof(self._memory)
        self._look = (ctypes.c_long * 2)(0, round(LOOK * 1e9))

    def wait(self, offset: int, seen: int) -> bool:
        """Sleep while the word is ``seen``; False unless it was woken, as after LOOK seconds."""
        woken: int = self._call(FUTEX, self._start + offset, 0, seen & 0xFFFFFFFF, self._look)
        return woken == 0

    def wake(self, offset: int) -> None:
        """Wake all who wait for the word."""
        self._call(FUTEX, self._start + offset, 1, 2**31 - 1, None)


def decline() -> None:
    """Keep the default group and all groups that are made inside it off shared memory, from their first call on."""
    _declined.add(dist.group.WORLD)


def of(pg: Any) -> SharedMemory | None:
    """The memory that the ranks of ``pg`` share; None where the backend carries all. The first call is collective."""
    try:
        return _opened[pg]
    except KeyError:
        memory = _opened[pg] = _open(pg) if _is_gloo(pg) else None
        return memory


def _is_gloo(pg: Any) -> bool:
    # Simulated and checked groups are subclasses.
    return type(pg) is dist.ProcessGroup and isinstance(pg._get_backend(torch.device("cpu")), dist.ProcessGroupGloo)


def _open(pg: dist.ProcessGroup) -> SharedMemory | None:
    """Rank 0 makes a file without a name, so that nothing is left over; the others find it among its open files."""
    place, first = _place(), dist.get_rank(pg) == 0
    memory = _try(pg, lambda: _new_file(_size(dist.get_world_size(pg)))) if place is not None and first else None
    found = _of_all((place, os.getpid(), memory and memory.fd), pg)
    _, pid, fd = found[0]
    if fd is None or any(where != place for where, *_ in found):
        return None
    if not first:
        memory = _try(pg, lambda: os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR))
    return memory if all(_of_all(memory is not None, pg)) else None


def _new_file(size: int) -> int:
    fd = os.memfd_create("isoshard")
    os.truncate(fd, size)
    return fd


def _try(pg: dist.ProcessGroup, open_file: Callable[[], int]) -> SharedMemory | None:
    try:
        return SharedMemory(pg, open_file())
    except OSError:
        return None


def _of_all(value: Any, pg: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(pg)
    dist.all_gather_object(values, value, group=pg)
    return values


def _place() -> str | None:
    """Host and process namespace, in which a process id names one process; None where memory is not shared."""
    if dist.group.WORLD in _declined or sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _slots_at(world_size: int) -> int:
    return -(-8 * LINE * world_size // mmap.PAGESIZE) * mmap.PAGESIZE


def _size(world_size: int) -> int:
    return _slots_at(world_size) + 2 * world_size * SLOT_BYTES
