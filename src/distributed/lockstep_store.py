"""The key-value store of a simulated job: a rank that waits for a key lets the others run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

from .lockstep import Lockstep, RankThread
from .meeting import StoreKeys
from .origin import call_site


class LockstepStore(Store):
    """Stands for torch's TCPStore and FileStore; all ranks see the keys that ``lockstep`` holds."""

    def __init__(self, lockstep: Lockstep) -> None:
        super().__init__()
        self._lockstep, self._content = lockstep, lockstep.store

    def set(self, key: str, value: Any) -> None:
        self._content[key] = value.encode() if isinstance(value, str) else bytes(value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._content[key]

    def add(self, key: str, amount: int) -> int:
        total = int(self._content.get(key, b"0")) + amount
        self._content[key] = str(total).encode()
        return total

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self._content.get(key, expected.encode()) == expected.encode():
            self._content[key] = desired.encode()
        return self._content[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        thread, what = self._waiting(keys)
        thread.wait_for(what)

    def check(self, keys: list[str]) -> bool:
        thread, what = self._waiting(keys)
        return thread.poll(what)

    def delete_key(self, key: str) -> bool:
        return self._content.pop(key, None) is not None

    def num_keys(self) -> int:
        return len(self._content)

    def set_timeout(self, timeout: timedelta) -> None:
        """Time plays no part: when nobody can run any more, the keys are named."""

    def _waiting(self, keys: list[str]) -> tuple[RankThread, StoreKeys]:
        thread = self._lockstep.current("the store")
        others = [rank for rank in range(self._lockstep.world_size) if rank != thread.rank]
        return thread, StoreKeys(keys, self._content, others, call_site())
