"""A collective of real processes failed: who is missing?

A backend says "connection closed by peer", or that time is up, and names nobody. Here the ranks that are left leave a
line in the store of the job; those of which none comes are missing.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import CodeType, FrameType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d

from .group import Group
from .origin import call_site, in_backward
from .signature import name_ranks

ROLL_CALL = 1.5
"""Seconds that ranks are given to say that they are there."""

# Newer versions of torch have it in public, and warn at the old name.
_set_timeout: Any = dist.set_timeout if hasattr(dist, "set_timeout") else distributed_c10d._set_pg_timeout


class RankFailure(RuntimeError):
    """A collective failed because ranks are missing; names them and the call."""


def names_faults(pg: Any) -> bool:
    """Whether a process group is simulated or checked: those name what is wrong by themselves."""
    return getattr(pg, "names_faults", False)


def explain(error: RuntimeError, call: str, group: Group) -> RuntimeError:
    """``error`` of the collective ``call`` (``all_reduce(float32[4])``) in words that name the missing ranks."""
    assert group.pg is not None
    ranks = dist.get_process_group_ranks(group.pg)
    call += f" {'backward' if in_backward() else 'forward'}, at {call_site()}"
    try:
        lines = roll_call(distributed_c10d._get_default_store(), dist.get_rank(), ranks, call)
    except RuntimeError as lost:
        return RankFailure(f"{call}: failed, and so did the store of the job, which rank 0 or torchrun keeps: {lost}")
    missing = [rank for rank in ranks if rank not in lines]
    others = "".join(f"\n  rank {rank}: {line}" for rank, line in lines.items())
    fate = f"{name_ranks(missing)} ended, or hang" if missing else "all ranks are there, but not in the same call"
    reason = str(error).splitlines()[0].split(". This is typically")[0]
    return RankFailure(f"{call}: failed in the group of ranks {ranks}: {fate}{others}\n  the backend says: {reason}")


def roll_call(store: Store, me: int, ranks: list[int], line: str) -> dict[int, str]:
    """Leave ``line`` for the others, and return the lines of those ranks that answer within ``ROLL_CALL`` seconds."""
    keys = {rank: f"isoshard/failure/{rank}" for rank in ranks}
    store.set(keys[me], line)
    deadline = time.monotonic() + ROLL_CALL
    while time.monotonic() < deadline and not store.check(list(keys.values())):
        time.sleep(0.05)
    return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}


def postpone_sigterm(door: CodeType) -> None:
    """Let a rank that waits inside ``door`` say what it was waiting for before it obeys SIGTERM.

    When one rank dies, torchrun sends SIGTERM to the others at once, often before they have noticed. Nothing changes
    for a program with a handler of its own, or outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return

    def obey(signum: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code is not door:
            frame = frame.f_back
        if frame is not None:
            again = threading.Timer(2 * ROLL_CALL, os.kill, [os.getpid(), signum])
            again.daemon = True
            again.start()
        else:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    signal.signal(signal.SIGTERM, obey)


@contextmanager
def long_wait(group: Group, seconds: float) -> Iterator[None]:
    """Inside, collectives of ``group`` may take ``seconds``: some ranks work while others wait. Called by all ranks."""
    pg: Any = group.pg
    if pg is None or hasattr(pg, "lockstep"):
        yield
        return
    before = timeout_of(pg)
    set_timeout(pg, timedelta(seconds=seconds))
    try:
        yield
    finally:
        set_timeout(pg, before)


def set_timeout(pg: Any, timeout: timedelta) -> None:
    """How long a collective of ``pg`` may take from now on; among simulated ranks time plays no part."""
    if not names_faults(pg):
        _set_timeout(timeout, pg)
    elif hasattr(pg, "checks"):
        pg.set_timeout(timeout)


def same_timeout(group: Group, others: Iterable[Group]) -> None:
    """Collectives of ``others`` may take as long as those of ``group``: torch gives new groups its own timeout."""
    if group.pg is not None and not hasattr(group.pg, "lockstep"):
        for other in others:
            set_timeout(other.pg, timeout_of(group.pg))


def timeout_of(pg: Any) -> timedelta:
    """How long a collective of ``pg``, of real processes, may take."""
    options = pg.checks if names_faults(pg) else pg._get_backend(pg._device_types[0]).options
    found: timedelta = getattr(options, "timeout", None) or options._timeout
    return found
