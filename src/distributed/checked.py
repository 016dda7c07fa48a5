"""Real process groups whose ranks compare what they are about to do before they do it.

Each rank leaves the signature of its call in the store of the job and waits for those of the others. Where they do not
agree, every rank raises the same sentence, and the backend, which would abort, hang or mix up bytes, is not called.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from .checked_messages import CheckError, Messages, put
from .failure import ROLL_CALL, roll_call
from .origin import ModuleTracker, call_site, called_by_torch_api
from .pieces import misfit, pieces
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
    _compare_members(options, checks, ranks, label)
    return CheckedProcessGroup(_inner_group(options, checks), checks, ranks, label, options)


def _compare_members(options: Any, checks: Checks, ranks: tuple[int, ...], label: str) -> None:
    """Raise CheckError when other ranks make the group of this name of other ranks."""
    mine, me = str(list(ranks)), ranks[options.group_rank]
    key = f"isoshard/group/{options.group_id}"
    checks.store.set(f"{key}/{me}", f"makes {label} of ranks {mine} at {call_site()}")
    if checks.store.compare_set(key, "", mine).decode() == mine:
        return
    time.sleep(ROLL_CALL)  # for the others to come here, too
    found = [rank for rank in range(dist.get_world_size()) if checks.store.check([f"{key}/{rank}"])]
    lines = "".join(f"\n  rank {rank} {checks.store.get(f'{key}/{rank}').decode()}" for rank in found)
    raise CheckError(f"new_group must be called by all ranks with the same ranks, in the same order:{lines}")


def _inner_group(options: Any, checks: Checks) -> dist.ProcessGroup:
    inner = dist.ProcessGroup(options.store, options.group_rank, options.group_size)
    kind = dist.ProcessGroup.BackendType
    inner._set_default_backend(kind.NCCL if checks.backend == "nccl" else kind.GLOO)
    place = options.group_rank, options.group_size
    patience = options.timeout if dist.group.WORLD is None else checks.timeout  # to meet for the first time
    gloo = dist.ProcessGroupGloo(PrefixStore("cpu", options.store), *place, patience)
    gloo._set_default_timeout(checks.timeout)
    inner._register_backend(torch.device("cpu"), kind.GLOO, gloo)
    if checks.backend == "nccl":
        settings = dist.ProcessGroupNCCL.Options()
        settings._timeout = options.timeout
        nccl = dist.ProcessGroupNCCL(PrefixStore("cuda", options.store), *place, settings)
        inner._register_backend(torch.device("cuda"), kind.NCCL, nccl)
    return inner


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
        self._messages = Messages(self._store, self._me, ranks, lambda: checks.timeout, self._report)
        if label == "world":
            checks.modules.start()

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a rank may keep the others waiting, in all groups, and the backend's own timeout in this one."""
        self.checks.timeout = timeout
        for device in self.inner._device_types:
            self.inner._get_backend(device)._set_default_timeout(timeout)

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
        moved = pieces(method, args, signature.root, len(self.ranks))
        is_async = getattr(opts, "asyncOp", False) and called_by_torch_api()
        self._compare(Call(signature, self.checks.modules.origin(), moved, is_async))
        call = getattr(self.inner, method, None) or getattr(self.inner, _OLD_NAMES[method])
        work: dist.Work = call(*args) if opts is None else call(*args, opts)
        return work

    def _compare(self, call: Call) -> None:
        self._index += 1
        keys = {rank: f"{self._index}/{rank}" for rank in self.ranks}
        put(self._store, keys[self._me], call)
        if not self._messages.wait(list(keys.values()), self._store):
            raise self._missing(call, keys)
        texts = self._store.multi_get(list(keys.values()))
        calls: dict[int, Call] = {rank: pickle.loads(text) for rank, text in zip(keys, texts, strict=True)}
        self._store.delete_key(f"{self._index - 1}/{self._me}")  # all have read it: they are at this call
        if not agree(calls):
            raise CheckError(describe_mismatch(calls, self._where()))
        text = misfit([call.payload for call in calls.values()])
        if text is not None:
            raise CheckError(f"{call.signature.op}: {text} ({self._where()}):\n{list_calls(calls)}")
        if self._before and in_opposite_order(self._before, calls):
            raise CheckError(describe_crossing(self._before, calls, "the call before", self._where()))
        self._before = calls

    def _where(self) -> str:
        return f"collective {self._index} of group {self.label} {list_members(self.ranks)}"

    def _missing(self, call: Call, keys: dict[int, str]) -> CheckError:
        """Nobody answers for some ranks: say what the ranks that are there wait for."""
        absent = [rank for rank in self.ranks if not self._store.check([keys[rank]])]
        if not absent:
            return CheckError(f"a rank came too late to {call} ({self._where()})")
        last = {rank: self._before[rank] for rank in absent if rank in self._before}
        seconds = self.checks.timeout.total_seconds()
        return CheckError(
            f"{name_ranks(absent)} did not come to {call} within {seconds:g} s ({self._where()})"
            + self._report(f"waits in {call}; {self._where()} lacks {name_ranks(absent)}")
            + (f"\nbefore, they were in\n{list_calls(last)}" if last else "")
        )

    def _report(self, line: str) -> str:
        """``line`` of this rank, and the lines of the others that wait in vain at this moment."""
        lines = roll_call(self.checks.store, self._me, list(range(dist.get_world_size())), line)
        return "".join(f"\n  rank {rank}: {text}" for rank, text in lines.items())

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> dist.Work:
        call = Call(Signature("send", None, None, specs(tensors)), self.checks.modules.origin())
        work = self.inner.send(tensors, destination, tag)
        if self.checks.backend == "nccl":  # where a receive that begins late could stall the kernels of its group
            return work
        return self._messages.send(call, self.ranks[destination], tag, work)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> dist.Work:
        return self._receive(tensors, source, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> dist.Work:
        return self._receive(tensors, None, tag)

    recvAnysource = recv_anysource

    def _receive(self, tensors: list[Tensor], source: int | None, tag: int) -> dist.Work:
        if self.checks.backend == "nccl":
            return self.inner.recv_anysource(tensors, tag) if source is None else self.inner.recv(tensors, source, tag)
        call = Call(Signature("recv", None, None, specs(tensors)), self.checks.modules.origin())
        sender = None if source is None else self.ranks[source]
        return self._messages.receive(call, sender, tag, lambda found: self.inner.recv(tensors, found, tag))
