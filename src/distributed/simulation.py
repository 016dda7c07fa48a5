"""Simulated ranks: an ordinary torch.distributed backend whose ranks are threads of this process, in lockstep."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..sharding import check_num_shards
from .group import Group, ReduceOrder
from .in_flight import tensors_in
from .lockstep import Lockstep, RankThread, SimulationError
from .meeting import Message, Waitable
from .origin import called_by_torch_api
from .signature import Signature, specs
from .signed_group import SignedProcessGroup
from .simulated_collectives import ACTIONS

BACKEND = "isoshard_simulated"


def simulate(
    program: Callable[..., Any],
    world_size: int,
    *args: Any,
    num_shards: int | None = None,
    reduce_order: ReduceOrder = "backend",
    schedule_seed: int | None = None,
) -> list[Any]:
    """Run ``program(group, *args)`` as ``world_size`` ranks in this process; the results in rank order.

    Inside, the default process group, ``dist.get_rank()`` and ``group=`` arguments are the simulated ones, and each
    rank has its own torch, numpy and python random state. The process is left as it was found. With ``num_shards``
    given, the intra-op thread count is 1 meanwhile, as it is under torchrun. Ranks run in rank order, each until it
    has to wait; ``schedule_seed`` shuffles that, the same way for the same seed.

    Raises ValueError for sizes that do not fit, SimulationError (with the cause chained) when a rank raises, when
    ranks call different collectives, wait for each other for ever, or use a buffer before ``wait()``, and
    RuntimeError inside another simulation or beside a real process group.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size} must be at least 1")
    check_num_shards(world_size if num_shards is None else num_shards, world_size)
    if isinstance(threading.current_thread(), RankThread):
        raise RuntimeError("simulate() was called inside a simulated rank; simulations do not nest")
    if dist.is_initialized():
        raise RuntimeError("simulate() needs a process without a default process group; destroy it first")

    threads, hook = torch.get_num_threads(), sys.excepthook
    schedule = None if schedule_seed is None else random.Random(schedule_seed)
    lockstep = Lockstep(world_size, (num_shards, reduce_order), schedule)

    def body(rank: int) -> Any:
        with rank_settings(1 if num_shards is not None else threads):
            return program(Group(num_shards=num_shards, reduce_order=reduce_order), *args)

    register_backend()
    dist.init_process_group(BACKEND, rank=0, world_size=world_size, store=dist.HashStore(), pg_options=lockstep)
    try:
        # A compiled graph would carry the constants of one rank, such as its number, into another.
        with torch.compiler.set_stance("force_eager"):
            return lockstep.run(body)
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.excepthook = hook


def rank_settings(threads: int) -> Any:
    """What holds in the thread of a rank alone, as a context manager.

    OpenMP keeps a thread count for each thread: a new one would compute with all cores, whatever torch reports.
    With several ranks on one GPU autograd's device thread would serve them all, and a collective never meet.
    """
    torch.set_num_threads(threads)
    return torch.autograd.set_multithreading_enabled(False)


def _outlive_fake_tensors() -> None:
    """Without a GPU, FakeTensorMode (of DTensor, FSDP2) installs a device guard that lives in the thread which needs it
    first, and torch built for CUDA crashes when that thread was a rank of an earlier simulation."""
    install = getattr(torch._C, "_ensureCUDADeviceGuardSet", None)
    if install is not None and not torch.cuda.is_available():
        install()


def register_backend() -> None:
    """Make the simulated backend known to torch, and ranks safe that come and go as threads."""
    _outlive_fake_tensors()
    dist.Backend.register_backend(BACKEND, _create_group, extended_api=True, devices=["cpu", "cuda"])


def _create_group(options: Any, lockstep: Lockstep | None) -> SimulatedProcessGroup:
    """Called by torch: once for the default group with ``lockstep`` given, then by each rank for its new groups."""
    ranks = tuple(options.global_ranks_in_group)
    if lockstep is not None:
        return SimulatedProcessGroup(lockstep, ranks or tuple(range(lockstep.world_size)), "world", options.group_id)
    thread = threading.current_thread()
    if not isinstance(thread, RankThread):
        raise SimulationError("a simulated group can only be created by a rank inside simulate()")
    count = thread.groups_created[ranks] = thread.groups_created.get(ranks, 0) + 1
    return SimulatedProcessGroup(thread.lockstep, ranks, f"new_group {count}", options.group_id)


class SimulatedWork(dist.Work):
    """The handle of one rank's part of a call."""

    def __init__(self, thread: RankThread, what: Waitable, outputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._thread, self._what, self._outputs = thread, what, outputs

    def wait(self, timeout: Any = None) -> bool:
        self._thread.wait_for(self._what)
        self._thread.in_flight.remove(self)
        return True

    def is_completed(self) -> bool:
        complete = self._thread.poll(self._what)
        if complete:
            self._thread.in_flight.remove(self)
        return complete

    def get_future(self) -> Any:
        self.wait()
        future: Any = torch.futures.Future()
        future.set_result(list(self._outputs))
        return future

    def source_rank(self) -> int:
        """The rank in the group from which a message came."""
        message = self._what
        assert isinstance(message, Message) and message.peer is not None
        return message.members.index(message.peer)

    _source_rank = source_rank


class SimulatedProcessGroup(SignedProcessGroup):
    """A group of simulated ranks. The default group of ``simulate`` is one object; its ``rank()`` is the caller's."""

    names_faults = True

    def __init__(self, lockstep: Lockstep, ranks: tuple[int, ...], label: str, name: str) -> None:
        super().__init__(0, len(ranks))
        self.lockstep, self.ranks, self.key, self._name = lockstep, ranks, (label, ranks), name
        if len(ranks) == lockstep.world_size:
            self.defaults = lockstep.defaults

    @property
    def group_name(self) -> str:
        return self._name

    def rank(self) -> int:
        thread = threading.current_thread()
        return self.ranks.index(thread.rank) if isinstance(thread, RankThread) else 0

    getRank = rank  # the name by which C++ asks

    def getBackendName(self) -> str:
        return BACKEND

    def shutdown(self) -> None:
        """Nothing to release."""

    def _run(
        self, method: str, signature: Signature, args: tuple[Any, ...], outputs: Sequence[Tensor], opts: Any
    ) -> SimulatedWork:
        is_async = getattr(opts, "asyncOp", False) and called_by_torch_api()  # C++ waits by itself
        thread = self.lockstep.current(signature.op)
        inputs: list[Tensor] = []
        if is_async or not thread.in_flight.empty:
            inputs = [tensor for tensor in tensors_in(args) if all(tensor is not out for out in outputs)]
        call = self.lockstep.call(thread, signature, args, (outputs, inputs), is_async)
        meeting = self.lockstep.meet(thread, self.key, call, lambda calls: ACTIONS[method](calls, opts))
        work = SimulatedWork(thread, meeting, outputs)
        if is_async and (outputs or inputs):
            thread.in_flight.add(work, call, outputs, inputs)
        return work

    def send(self, tensors: list[Tensor], destination: int, tag: int) -> SimulatedWork:
        return self._message(True, tensors, self.ranks[destination], tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> SimulatedWork:
        return self._message(False, tensors, self.ranks[source], tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> SimulatedWork:
        return self._message(False, tensors, None, tag)

    recvAnysource = recv_anysource

    def _message(self, sends: bool, tensors: list[Tensor], peer: int | None, tag: int) -> SimulatedWork:
        outputs, inputs = ([], tensors) if sends else (tensors, [])
        signature = Signature("send" if sends else "recv", None, None, specs(tensors))
        thread = self.lockstep.current(signature.op)
        call = self.lockstep.call(thread, signature, tensors, (outputs, inputs), True)
        message = Message(sends, thread.rank, peer, tag, self.ranks, call)
        self.lockstep.send_or_receive(thread, self.key, message)
        work = SimulatedWork(thread, message, outputs)
        if tensors:
            thread.in_flight.add(work, call, outputs, inputs)
        return work
