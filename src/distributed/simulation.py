"""Simulated ranks: an ordinary torch.distributed backend whose ranks are threads of this process, in lockstep."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..sharding import check_num_shards
from .group import Group, ReduceOrder
from .lockstep import Lockstep, Meeting, RankThread, SimulationError
from .reduction import ring_sum

BACKEND = "isoshard_simulated"

_REDUCTIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "SUM": ring_sum,
    "AVG": lambda terms: ring_sum(terms) / len(terms),
    "PRODUCT": functools.partial(functools.reduce, torch.mul),
    "MAX": functools.partial(functools.reduce, torch.maximum),
    "MIN": functools.partial(functools.reduce, torch.minimum),
    "BAND": functools.partial(functools.reduce, torch.bitwise_and),
    "BOR": functools.partial(functools.reduce, torch.bitwise_or),
    "BXOR": functools.partial(functools.reduce, torch.bitwise_xor),
}


def simulate(
    program: Callable[..., Any],
    world_size: int,
    *args: Any,
    num_shards: int | None = None,
    reduce_order: ReduceOrder = "backend",
) -> list[Any]:
    """Run ``program(group, *args)`` as ``world_size`` ranks in this process; the results in rank order.

    Inside, the default process group, ``dist.get_rank()`` and ``group=`` arguments are the simulated ones, and each
    rank has its own torch, numpy and python random state. The process is left as it was found. With ``num_shards``
    given, the intra-op thread count is 1 meanwhile, as it is under torchrun.

    Raises ValueError for sizes that do not fit, SimulationError (with the cause chained) when a rank raises, when
    ranks call different collectives or wait for each other for ever, and RuntimeError inside another simulation or
    beside a real process group.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size} must be at least 1")
    check_num_shards(world_size if num_shards is None else num_shards, world_size)
    if isinstance(threading.current_thread(), RankThread):
        raise RuntimeError("simulate() was called inside a simulated rank; simulations do not nest")
    if dist.is_initialized():
        raise RuntimeError("simulate() needs a process without a default process group; destroy it first")

    threads, hook = torch.get_num_threads(), sys.excepthook

    def body(rank: int) -> Any:
        # OpenMP keeps a thread count for each thread: a new one would compute with all cores, whatever torch reports.
        torch.set_num_threads(1 if num_shards is not None else threads)
        # With several ranks on one GPU autograd's device thread would serve them all, and a collective never meet.
        with torch.autograd.set_multithreading_enabled(False):
            return program(Group(num_shards=num_shards, reduce_order=reduce_order), *args)

    lockstep = Lockstep(world_size, (num_shards, reduce_order))
    dist.Backend.register_backend(BACKEND, _create_group, extended_api=True, devices=["cpu", "cuda"])
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
    """The handle of one rank's part of a collective."""

    def __init__(self, thread: RankThread, meeting: Meeting, outputs: Any) -> None:
        super().__init__()
        self._thread, self._meeting, self._outputs = thread, meeting, outputs

    def wait(self, timeout: Any = None) -> bool:
        self._thread.wait_for(self._meeting)
        return True

    def is_completed(self) -> bool:
        return self._meeting.complete

    def get_future(self) -> Any:
        self.wait()
        future: Any = torch.futures.Future()
        future.set_result(self._outputs)
        return future


class SimulatedProcessGroup(dist.ProcessGroup):
    """A group of simulated ranks. The default group is one object for all; its ``rank()`` is that of the caller.

    Sums have the bits of gloo's all-reduce. Outputs are copies: no rank ever sees another rank's memory.
    """

    def __init__(self, lockstep: Lockstep, ranks: tuple[int, ...], label: str, name: str) -> None:
        super().__init__(0, len(ranks))
        self.lockstep, self.ranks, self.label, self._name = lockstep, ranks, label, name
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

    def _post(
        self, signature: tuple[Any, ...], payload: Any, action: Callable[[list[Any]], None], outputs: Any
    ) -> SimulatedWork:
        thread = self.lockstep.current()
        meeting = self.lockstep.meet(self.label, self.ranks, signature, payload, action)
        return SimulatedWork(thread, meeting, outputs)

    def barrier(self, opts: Any = None) -> SimulatedWork:
        return self._post(("barrier",), None, lambda payloads: None, [])

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> SimulatedWork:
        op = _op_name(opts)

        def action(payloads: list[list[Tensor]]) -> None:
            for terms in zip(*payloads, strict=True):
                _copy_to_all(terms, _reduce(op, terms))

        return self._post(("all_reduce", op, *_specs(tensors)), tensors, action, tensors)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any) -> SimulatedWork:
        op, root = _op_name(opts), opts.rootRank

        def action(payloads: list[list[Tensor]]) -> None:
            payloads[root][0].copy_(_reduce(op, [tensors[0] for tensors in payloads]))

        return self._post(("reduce", op, f"root={root}", *_specs(tensors)), tensors, action, tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> SimulatedWork:
        root = opts.rootRank

        def action(payloads: list[list[Tensor]]) -> None:
            for copies in zip(*payloads, strict=True):
                _copy_to_all(copies, copies[root].clone())

        return self._post(("broadcast", f"root={root}", *_specs(tensors)), tensors, action, tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> SimulatedWork:
        def action(payloads: list[tuple[list[list[Tensor]], list[Tensor]]]) -> None:
            for received, _ in payloads:
                for out, (_, sent) in zip(received[0], payloads, strict=True):
                    _deliver("all_gather", sent[0], out)

        return self._post(("all_gather", *_specs(inputs)), (outputs, inputs), action, outputs)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> SimulatedWork:
        def action(payloads: list[tuple[list[Tensor], list[Tensor]]]) -> None:
            for i in range(len(inputs)):
                whole = torch.cat([sent[i].reshape(-1) for _, sent in payloads])
                for received, _ in payloads:
                    received[i].copy_(whole.view(received[i].shape))

        return self._post(("all_gather", *_specs([*outputs, *inputs])), (outputs, inputs), action, outputs)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> SimulatedWork:
        return self.all_gather_single_coalesced([output], [input])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> SimulatedWork:
        op = _op_name(opts)

        def action(payloads: list[tuple[list[Tensor], list[list[Tensor]]]]) -> None:
            for rank, (received, _) in enumerate(payloads):
                _deliver("reduce_scatter", _reduce(op, [sent[0][rank] for _, sent in payloads]), received[0])

        return self._post(("reduce_scatter", op, *_specs(outputs)), (outputs, inputs), action, outputs)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> SimulatedWork:
        op = _op_name(opts)

        def action(payloads: list[tuple[list[Tensor], list[Tensor]]]) -> None:
            for i in range(len(inputs)):
                total = _reduce(op, [sent[i].reshape(-1) for _, sent in payloads]).chunk(len(payloads))
                for (received, _), share in zip(payloads, total, strict=True):
                    received[i].copy_(share.view(received[i].shape))

        return self._post(("reduce_scatter", op, *_specs([*outputs, *inputs])), (outputs, inputs), action, outputs)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> SimulatedWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> SimulatedWork:
        def action(payloads: list[tuple[list[Tensor], list[Tensor]]]) -> None:
            for rank, (received, _) in enumerate(payloads):
                for out, (_, sent) in zip(received, payloads, strict=True):
                    _deliver("all_to_all", sent[rank], out)

        return self._post(("all_to_all", inputs[0].dtype), (outputs, inputs), action, outputs)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> SimulatedWork:
        def cut(tensor: Tensor, splits: list[int]) -> list[Tensor]:
            return list(tensor.split(splits or [tensor.shape[0] // len(self.ranks)] * len(self.ranks)))

        return self.alltoall(cut(output, output_splits), cut(input, input_splits), opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> SimulatedWork:
        root = opts.rootRank

        def action(payloads: list[tuple[list[list[Tensor]], list[Tensor]]]) -> None:
            for out, (_, sent) in zip(payloads[root][0][0], payloads, strict=True):
                _deliver("gather", sent[0], out)

        return self._post(("gather", f"root={root}", *_specs(inputs)), (outputs, inputs), action, outputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> SimulatedWork:
        root = opts.rootRank

        def action(payloads: list[tuple[list[Tensor], list[list[Tensor]]]]) -> None:
            for (received, _), sent in zip(payloads, payloads[root][1][0], strict=True):
                _deliver("scatter", sent, received[0])

        return self._post(("scatter", f"root={root}", *_specs(outputs)), (outputs, inputs), action, outputs)

    # Names that torch before 2.13 calls.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _op_name(opts: Any) -> str:
    op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
    return str(getattr(op, "op", op)).rsplit(".", 1)[-1]


def _specs(tensors: Sequence[Tensor]) -> tuple[str, ...]:
    return tuple(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors)


def _reduce(op: str, terms: Sequence[Tensor]) -> Tensor:
    if op not in _REDUCTIONS:
        raise SimulationError(f"reduce-op {op} is not simulated; choose one of {', '.join(_REDUCTIONS)}")
    return _REDUCTIONS[op](list(terms))


def _deliver(name: str, sent: Tensor, out: Tensor) -> None:
    if sent.numel() != out.numel():
        raise SimulationError(f"{name}: a tensor {list(sent.shape)} was sent where {list(out.shape)} is received")
    out.copy_(sent.view(out.shape))


def _copy_to_all(outputs: Sequence[Tensor], value: Tensor) -> None:
    for out in outputs:
        out.copy_(value)
