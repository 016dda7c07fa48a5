"""Messages between two ranks of a checked group: a receive begins when the sender's tensor is known to fit.

The sender leaves its call in the store, the receiver its answer. Whoever waits meanwhile starts the receives of its
own that can start, so that ranks may wait for their sends and receives in any order.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from .signature import Call

FITS = b"fits"
PAUSE = 0.002
"""Seconds between two looks at the store."""


class CheckError(RuntimeError):
    """Ranks did not agree on a collective, or did not come to it."""


class Messages:
    """The messages of one rank in one group of ``ranks``.

    ``timeout`` gives how long the other side may take, ``report`` what to say of all ranks when it took longer.
    """

    def __init__(
        self,
        store: Store,
        me: int,
        ranks: Sequence[int],
        timeout: Callable[[], timedelta],
        report: Callable[[str], str],
    ) -> None:
        self._store, self._me, self._ranks, self._timeout, self._report = store, me, ranks, timeout, report
        self._counts: dict[tuple[int, int, int], int] = {}
        self._pending: list[Receive] = []

    def send(self, call: Call, destination: int, tag: int, work: dist.Work) -> dist.Work:
        """``work`` is the backend's send, under way already."""
        key = self._next_key(self._me, destination, tag)
        put(self._store, key, call)
        return Send(self, call, key, destination, tag, work)

    def receive(self, call: Call, source: int | None, tag: int, begin: Callable[[int], dist.Work]) -> dist.Work:
        """``begin(source)`` starts the backend's receive. ``source`` None is any rank."""
        key = None if source is None else self._next_key(source, self._me, tag)
        receive = Receive(self, call, key, source, tag, begin)
        self._pending.append(receive)
        return receive

    def wait(self, keys: list[str], store: Store) -> bool:
        """Whether all ``keys`` of ``store`` come in time."""
        if self._pending:
            return self._poll(lambda: store.check(keys))
        try:
            store.wait(keys, self._timeout())
        except RuntimeError:
            return False
        return True

    def progress(self) -> None:
        """Begin the receives whose sender has come. Raises CheckError when the tensors do not fit."""
        for receive in list(self._pending):
            if receive.key is None:
                self._find_sender(receive)
            if receive.key is not None and self._store.check([receive.key]):
                self._begin(receive, receive.key)

    def await_answer(self, send: Send) -> None:
        """Wait until the receiver has begun. Raises CheckError when it does not come, or expects something else."""
        answer_key = f"{send.key}/answer"
        if not self.wait([answer_key], self._store):
            what = f"what rank {self._me} sends in {send.call} (tag {send.tag})"
            raise CheckError(f"rank {send.destination} did not receive within {self._patience} {what}{self._all(send)}")
        answer = self._store.get(answer_key)
        for key in (send.key, answer_key):
            self._store.delete_key(key)
        if answer != FITS:
            raise CheckError(answer.decode())

    def await_sender(self, receive: Receive) -> None:
        """Wait until ``receive`` has begun. Raises CheckError when the sender does not come."""
        if not self._poll(lambda: receive.work is not None):
            who = "any rank" if receive.source is None else f"rank {receive.source}"
            what = f"what rank {self._me} waits for in {receive.call} (tag {receive.tag})"
            raise CheckError(f"{who} did not send within {self._patience} {what}{self._all(receive)}")

    def has_answer(self, send: Send) -> bool:
        """Whether the receiver has begun."""
        return self._store.check([f"{send.key}/answer"])

    def rank_in_group(self, rank: int) -> int:
        """The number of global rank ``rank`` in the group."""
        return self._ranks.index(rank)

    @property
    def _patience(self) -> str:
        return f"{self._timeout().total_seconds():g} s"

    def _all(self, handle: Send | Receive) -> str:
        return self._report(f"waits in {handle.call} (tag {handle.tag})")

    def _poll(self, done: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + self._timeout().total_seconds()
        while True:
            self.progress()
            if done():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(PAUSE)

    def _begin(self, receive: Receive, key: str) -> None:
        self._pending.remove(receive)
        sent: Call = pickle.loads(self._store.get(key))
        text = ""
        if sent.signature.tensors != receive.call.signature.tensors:
            lines = f"  rank {receive.source}: {sent}\n  rank {self._me}: {receive.call}"
            text = f"a message does not fit (tag {receive.tag}):\n{lines}"
        answer: Any = text.encode() or FITS
        self._store.set(f"{key}/answer", answer)
        if text:
            raise CheckError(text)
        assert receive.source is not None
        receive.work = receive.begin(self.rank_in_group(receive.source))

    def _find_sender(self, receive: Receive) -> None:
        for source in self._ranks:
            count = self._counts.get((source, self._me, receive.tag), 0) + 1
            if self._store.check([_key(source, self._me, receive.tag, count)]):
                receive.source, receive.key = source, self._next_key(source, self._me, receive.tag)
                return

    def _next_key(self, source: int, destination: int, tag: int) -> str:
        place = source, destination, tag
        self._counts[place] = self._counts.get(place, 0) + 1
        return _key(*place, self._counts[place])


def _key(source: int, destination: int, tag: int, count: int) -> str:
    return f"message/{source}/{destination}/{tag}/{count}"


class Send(dist.Work):
    """The handle of a message that this rank sends."""

    def __init__(self, messages: Messages, call: Call, key: str, destination: int, tag: int, work: dist.Work) -> None:
        super().__init__()
        self.call, self.key, self.destination, self.tag = call, key, destination, tag
        self._messages, self._work, self._done = messages, work, False

    def wait(self, timeout: Any = None) -> bool:
        if not self._done:
            self._messages.await_answer(self)
            self._work.wait()
            self._done = True
        return True

    def is_completed(self) -> bool:
        self._messages.progress()
        return self._done or (self._messages.has_answer(self) and self.wait())


class Receive(dist.Work):
    """The handle of a message that this rank receives; ``work`` is the backend's, once it has begun."""

    def __init__(
        self,
        messages: Messages,
        call: Call,
        key: str | None,
        source: int | None,
        tag: int,
        begin: Callable[[int], dist.Work],
    ) -> None:
        super().__init__()
        self.call, self.key, self.source, self.tag, self.begin = call, key, source, tag, begin
        self.work: dist.Work | None = None
        self._messages = messages

    def wait(self, timeout: Any = None) -> bool:
        self._messages.await_sender(self)
        assert self.work is not None
        return self.work.wait()

    def is_completed(self) -> bool:
        self._messages.progress()
        return self.work is not None and self.wait()

    def source_rank(self) -> int:
        assert self.source is not None
        return self._messages.rank_in_group(self.source)

    _source_rank = source_rank


def put(store: Store, key: str, call: Call) -> None:
    """Leave ``call`` in the store."""
    text: Any = pickle.dumps(call)
    store.set(key, text)
