"""The sentences for what can be wrong with a program of several ranks."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Protocol

from .meeting import Meeting, Message, Waitable
from .origin import is_library
from .signature import Call, by_text, describe_crossing, describe_mismatch, list_calls, name_ranks


class Rank(Protocol):
    """What is known of a simulated rank."""

    rank: int
    ended: bool
    waits_for: Waitable | None
    polls: Waitable | None
    last_call: Call | None

    @property
    def ident(self) -> int | None: ...


def mismatch(meeting: Meeting) -> str:
    """Ranks that do not ask for the same."""
    return describe_mismatch(meeting.calls, str(meeting))


def mismatched_message(sent: Message, received: Message) -> str:
    """A message that does not fit into the tensor that is to receive it."""
    return (
        f"a message does not fit (group of ranks {list(sent.members)}, tag {sent.tag}):\n"
        f"  rank {sent.rank}: {sent.call}\n  rank {received.rank}: {received.call}"
    )


def crossed(before: Meeting, after: Meeting) -> str:
    """Two collectives of the same kind that ranks called in opposite orders, so that each met the other's data."""
    return describe_crossing(before.calls, after.calls, str(before), str(after))


def impossible(meeting: Meeting, error: Exception) -> str:
    """A collective whose tensors do not fit together."""
    return f"{error} ({meeting}):\n{list_calls(meeting.calls)}"


def raised(rank: int, error: BaseException, threads: Sequence[Rank]) -> str:
    """A rank that ended with an exception, and who was waiting for it."""
    site = user_line(error)
    waits = [
        f"\n  rank {thread.rank} waits in {thread.waits_for.waiting(thread.rank)}"
        for thread in threads
        if thread.waits_for is not None and not thread.waits_for.complete
    ]
    return f"rank {rank} raised {type(error).__name__}: {error}{site and f', at {site}'}{''.join(waits)}"


def left_open(unfinished: Sequence[Waitable]) -> str:
    """Calls that nobody waited for and that not all ranks joined."""
    lines = [f"  {text}" for what in unfinished for text in _lines(what)]
    return "all ranks have returned, but some never joined a call:\n" + "\n".join(lines)


def deadlock(threads: Sequence[Rank], disagreeing: Meeting | None) -> str:
    """Every rank that has not returned waits; for what, and for whom."""
    if disagreeing is not None:
        return mismatch(disagreeing)
    waiting = {t.rank: what for t in threads if not t.ended and (what := t.waits_for or t.polls) is not None}
    returned = [thread for thread in threads if thread.ended]
    ended = f"; {list_ranks([t.rank for t in returned])} already returned" if returned else ""
    lines = [f"  {line}" for line in by_text({rank: what.waiting(rank) for rank, what in waiting.items()})]
    needed = {rank for what in waiting.values() for rank in what.missing()}
    lines += [f"  rank {t.rank} returned{_after(t)}" for t in returned if t.rank in needed]
    cycle = _cycle({rank: what.missing() for rank, what in waiting.items()})
    if cycle:
        lines.append(f"  cycle: {' waits for '.join(f'rank {rank}' for rank in cycle)}")
    return f"deadlock: every running rank waits{ended}\n" + "\n".join(lines)


def list_ranks(ranks: Sequence[int]) -> str:
    """``rank 1 has`` or ``ranks 1, 2 have``."""
    return f"{name_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'}"


def user_line(error: BaseException) -> str:
    """``file:line`` of the innermost frame of the user's code in the traceback of ``error``, or nothing."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_library(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def whereabouts(thread: Rank) -> str:
    """``rank 2 was at file:line``."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    where = "its end" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return f"rank {thread.rank} was at {where}"


def _after(thread: Rank) -> str:
    return f" after {thread.last_call}" if thread.last_call else " without any call"


def _lines(what: Waitable) -> list[str]:
    if isinstance(what, Meeting):
        return [f"{name_ranks(sorted(what.calls))}: {what.waiting(min(what.calls))}"]
    return [f"rank {what.rank}: {what.waiting(what.rank)}"] if isinstance(what, Message) else []


def _cycle(waits_for: dict[int, list[int]]) -> list[int]:
    """Ranks of which each waits for the next, the last being the first; empty when there is no such circle."""
    for start in waits_for:
        path = [start]
        while len(path) <= len(waits_for):
            path.append(next((rank for rank in waits_for.get(path[-1], []) if rank in waits_for), -1))
            if path[-1] in path[:-1]:
                circle = path[path.index(path[-1]) :]
                return circle if len(circle) > 2 else []
            if path[-1] == -1:
                break
    return []
