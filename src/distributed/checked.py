"""Real process groups whose ranks compare what they are about to do before they do it.

Each rank leaves the signature of its call in the store of the job and waits for those of the others. Where they do not
agree, every rank raises the same sentence, and the backend, which would abort, hang or mix up bytes, is not called.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from .failure import roll_call
from .origin import ModuleTracker
from .signature import (
    Call,
    Signature,
    agree,
    describe_crossing,
    describe_mismatch,
    in_opposite_order,
    list_calls,
    list_members,
    name_ranks,
    specs,
)
from .signed_group import SignedProcessGroup

BACKEND = "isoshard_checked"

_OLD_NAMES = {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "all_to_all_single": "alltoall_base",
    "all_gather_single_coalesced": "allgather_into_tensor_coalesced",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
}


class CheckError(RuntimeError):
    """Ranks did not agree on a collective, or did not come to it."""


@dataclass
class Checks:
    """What the checked groups of a process share. ``timeout`` is how long a rank may keep the others waiting."""

    backend: str
    store: Store
    timeout: timedelta
    modules: ModuleTracker = field(default_factory=ModuleTracker)


def register_backend() -> None:
    """Make checked groups known to torch."""
    dist.Backend.register_backend(BACKEND, _create_group, extended_api=True, devices=["cpu", "cuda"])


def _create_group(options: Any, checks: Checks | None) -> CheckedProcessGroup:
    """Called by torch: for the default group with ``checks`` given, then for every new group."""
    label = "world"
    if checks is None:
        default = dist.group.WORLD
        assert isinstance(default, CheckedProcessGroup)
        checks, label = default.checks, f"new_group {options.group_id}"
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    inner = dist.ProcessGroup(options.store, options.group_rank, options.group_size)
    kind = dist.ProcessGroup.BackendType
    inner._set_default_backend(kind.NCCL if checks.backend == "nccl" else kind.GLOO)
    gloo = dist.ProcessGroupGloo(
        PrefixStore("cpu", options.store), options.group_rank, options.group_size, options.timeout
    )
    inner._register_backend(torch.device("cpu"), kind.GLOO, gloo)
    if checks.backend == "nccl":
        settings = dist.ProcessGroupNCCL.Options()
        settings._timeout = options.timeout
        store = PrefixStore("cuda", options.store)
        nccl = dist.ProcessGroupNCCL(store, options.group_rank, options.group_size, settings)
        inner._register_backend(torch.device("cuda"), kind.NCCL, nccl)
    return CheckedProcessGroup(inner, checks, ranks, label, options)


class CheckedProcessGroup(SignedProcessGroup):
    """Compares calls, then leaves them to ``inner``, an ordinary group of the same ranks."""

    names_faults = True

    def __init__(
        self, inner: dist.ProcessGroup, checks: Checks, ranks: tuple[int, ...], label: str, options: Any
    ) -> None:
        super().__init__(options.group_rank, options.group_size)
        self.inner, self.checks, self.ranks, self.label = inner, checks, ranks, label
        self._name = options.group_id
        self._me = ranks[options.group_rank]
        self._store = PrefixStore(f"isoshard/check/{options.group_id}", checks.store)
        self._index = 0
        self._before: dict[int, Call] = {}
        self._messages: dict[str, int] = {}
        if label == "world":
            checks.modules.start()

    @property
    def group_name(self) -> str:
        return str(self._name)

    def getBackendName(self) -> str:
        return BACKEND

    def shutdown(self) -> None:
        if self.label == "world":
            self.checks.modules.stop()

    def _run(
        self, method: str, signature: Signature, args: tuple[Any, ...], outputs: Sequence[Tensor], opts: Any
    ) -> dist.Work:
        self._compare(Call(signature, self.checks.modules.origin()))
        call = getattr(self.inner, method, None) or getattr(self.inner, _OLD_NAMES[method])
        work: dist.Work = call(*args) if opts is None else call(*args, opts)
        return work

    def _compare(self, call: Call) -> None:
        self._index += 1
        keys = {rank: f"{self._index}/{rank}" for rank in self.ranks}
        self._write(keys[self._me], call)
        try:
            self._store.wait(list(keys.values()), self.checks.timeout)
        except RuntimeError as error:
            raise self._missing(call, keys) from error
        texts = self._store.multi_get(list(keys.values()))
        calls: dict[int, Call] = {rank: pickle.loads(text) for rank, text in zip(keys, texts, strict=True)}
        self._store.delete_key(f"{self._index - 1}/{self._me}")  # all have read it: they are at this call
        if not agree(calls):
            raise CheckError(describe_mismatch(calls, self._where()))
        if self._before and in_opposite_order(self._before, calls):
            raise CheckError(describe_crossing(self._before, calls, "the call before", self._where()))
        self._before = calls

    def _where(self) -> str:
        return f"collective {self._index} of group {self.label} {list_members(self.ranks)}"

    def _missing(self, call: Call, keys: dict[int, str]) -> CheckError:
        """Nobody answers for some ranks: say what the ranks that are there wait for."""
        world = list(range(dist.get_world_size()))
        absent = [rank for rank in self.ranks if not self._store.check([keys[rank]])]
        lines = roll_call(
            self.checks.store, self._me, world, f"waits in {call}; {self._where()} lacks {name_ranks(absent)}"
        )
        last = {rank: self._before[rank] for rank in absent if rank in self._before}
        seconds = self.checks.timeout.total_seconds()
        return CheckError(
            f"{name_ranks(absent)} did not come to {call} within {seconds:g} s ({self._where()})"
            + "".join(f"\n  rank {rank}: {line}" for rank, line in lines.items())
            + (f"\nbefore, they were in\n{list_calls(last)}" if last else "")
        )

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> dist.Work:
        call = Call(Signature("send", None, None, specs(tensors)), self.checks.modules.origin())
        self._write(self._next_message(self._me, self.ranks[destination], tag), call)
        return self.inner.send(tensors, destination, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> dist.Work:
        if self.checks.backend == "nccl":  # a receive that starts late can stall the kernels of its group
            return self.inner.recv(tensors, source, tag)
        call = Call(Signature("recv", None, None, specs(tensors)), self.checks.modules.origin())
        key = self._next_message(self.ranks[source], self._me, tag)
        return _Receive(self, call, key, lambda: self.inner.recv(tensors, source, tag))

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> dist.Work:
        return self.inner.recv_anysource(tensors, tag)

    recvAnysource = recv_anysource

    def compare_message(self, call: Call, key: str) -> None:
        """Wait for the sender of message ``key``; raise CheckError unless what it sends fits the receive ``call``."""
        _, source, _, tag, _ = key.split("/")
        try:
            self._store.wait([key], self.checks.timeout)
        except RuntimeError as error:
            seconds = self.checks.timeout.total_seconds()
            raise CheckError(
                f"rank {source} did not send within {seconds:g} s what rank {self._me} waits for in {call} (tag {tag})"
            ) from error
        sent: Call = pickle.loads(self._store.get(key))
        self._store.delete_key(key)
        if sent.signature.tensors != call.signature.tensors:
            lines = f"  rank {source}: {sent}\n  rank {self._me}: {call}"
            raise CheckError(f"a message does not fit (group of ranks {list(self.ranks)}, tag {tag}):\n{lines}")

    def _write(self, key: str, call: Call) -> None:
        text: Any = pickle.dumps(call)
        self._store.set(key, text)

    def has_sent(self, key: str) -> bool:
        """Whether the sender of message ``key`` has come."""
        return self._store.check([key])

    def _next_message(self, source: int, destination: int, tag: int) -> str:
        pair = f"message/{source}/{destination}/{tag}"
        self._messages[pair] = self._messages.get(pair, 0) + 1
        return f"{pair}/{self._messages[pair]}"


class _Receive(dist.Work):
    """A receive that begins when it is waited for: not before the sender's tensor is known to fit."""

    def __init__(self, group: CheckedProcessGroup, call: Call, key: str, start: Callable[[], dist.Work]) -> None:
        super().__init__()
        self._group, self._call, self._key, self._start = group, call, key, start
        self._done = False

    def wait(self, timeout: Any = None) -> bool:
        if not self._done:
            self._group.compare_message(self._call, self._key)
            self._start().wait()
            self._done = True
        return True

    def is_completed(self) -> bool:
        return self._done or (self._group.has_sent(self._key) and self.wait())
