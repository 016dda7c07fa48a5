"""Where simulated ranks meet: collectives, messages from one rank to another, keys of the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .signature import Call, agree, in_opposite_order, list_members, name_ranks

Key = tuple[str, tuple[int, ...]]
Action = Callable[[list[Any]], None]


class Waitable(Protocol):
    """What a rank can wait for."""

    @property
    def complete(self) -> bool:
        """Whether the wait is over."""

    def missing(self) -> list[int]:
        """The ranks, any of which could complete it."""

    def waiting(self, rank: int) -> str:
        """What ``rank`` waits for, and who is missing, in one line."""


@dataclass
class Meeting:
    """The k-th collective of one group: complete when every member has called it."""

    group: str
    members: tuple[int, ...]
    index: int
    calls: dict[int, Call] = field(default_factory=dict)
    complete: bool = False

    def __str__(self) -> str:
        return f"collective {self.index} of group {self.group} {list_members(self.members)}"

    def missing(self) -> list[int]:
        return [rank for rank in self.members if rank not in self.calls]

    def waiting(self, rank: int) -> str:
        return f"{self.calls[rank]}; {self} lacks {name_ranks(self.missing())}"


@dataclass
class Message:
    """One side of a send and a receive in one group. ``peer`` is None in a receive from any rank."""

    sends: bool
    rank: int
    peer: int | None
    tag: int
    members: tuple[int, ...]
    call: Call
    complete: bool = False

    def missing(self) -> list[int]:
        return [self.peer] if self.peer is not None else [rank for rank in self.members if rank != self.rank]

    def waiting(self, rank: int) -> str:
        other = "any rank" if self.peer is None else f"rank {self.peer}"
        return f"{self.call}; {other} has not {'received' if self.sends else 'sent'} it (tag {self.tag})"

    def fits(self, other: Message) -> bool:
        """Whether ``other`` is the opposite side."""
        return (
            self.sends != other.sends
            and self.tag == other.tag
            and self.peer in (None, other.rank)
            and other.peer in (None, self.rank)
        )


@dataclass
class StoreKeys:
    """Keys of the store that a rank waits for."""

    keys: list[str]
    content: Mapping[str, bytes]
    others: list[int]
    site: str

    @property
    def complete(self) -> bool:
        return all(key in self.content for key in self.keys)

    def missing(self) -> list[int]:
        return self.others

    def waiting(self, rank: int) -> str:
        absent = [key for key in self.keys if key not in self.content]
        return f"the store's keys {absent}, which nobody sets, at {self.site}"


class Meetings:
    """All collectives and messages that are under way."""

    def __init__(self) -> None:
        self._open: dict[tuple[Key, int], Meeting] = {}
        self._counts: dict[tuple[Key, int], int] = {}
        self._last: dict[Key, Meeting] = {}
        self._messages: dict[Key, list[Message]] = {}

    def join(self, key: Key, rank: int, call: Call) -> Meeting:
        """``rank`` comes to its next collective of the group."""
        index = self._counts[key, rank] = self._counts.get((key, rank), 0) + 1
        meeting = self._open.get((key, index)) or self._open.setdefault((key, index), Meeting(*key, index))
        meeting.calls[rank] = call
        if len(meeting.calls) == len(meeting.members):
            del self._open[key, index]
        return meeting

    def crossed(self, key: Key, meeting: Meeting) -> Meeting | None:
        """The collective before this one, if two ranks called the two in opposite orders; notes this one."""
        before = self._last.get(key)
        self._last[key] = meeting
        if before is None or meeting.index != before.index + 1:
            return None
        return before if in_opposite_order(before.calls, meeting.calls) else None

    def post(self, key: Key, message: Message) -> Message | None:
        """The opposite side, if it was there already."""
        there = self._messages.setdefault(key, [])
        found = next((other for other in there if message.fits(other)), None)
        if found is None:
            there.append(message)
        else:
            there.remove(found)
        return found

    def disagreeing(self) -> Meeting | None:
        """A collective that not all have reached, but on which those that have do not agree."""
        return next((meeting for meeting in self._open.values() if not agree(meeting.calls)), None)

    def unfinished(self) -> list[Waitable]:
        """Collectives and messages for which somebody is missing."""
        return [*self._open.values(), *(message for there in self._messages.values() for message in there)]
