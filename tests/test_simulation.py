"""Simulated ranks: what programs may do there, what is found wrong with them, and what stays behind (nothing)."""

from __future__ import annotations

import functools
import inspect
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from src import Group, SimulationError, simulate
from src.distributed import all_gather, all_reduce, barrier, copy_to_region

from .conftest import OnRanks

Program = Callable[[Group], Any]


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """Ends a test whose ranks wait for ever: the error reaches ``simulate`` like Ctrl-C does."""

    def stop(*_: Any) -> None:
        raise TimeoutError("simulated ranks hang")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def process_state() -> dict[str, Any]:
    return {
        "random": pickle.dumps((torch.get_rng_state().numpy(), np.random.get_state(), random.getstate())),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "hook": sys.excepthook,
        "default group": dist.is_initialized(),
        "ranks alive": [t.name for t in threading.enumerate() if t.name.startswith("simulated rank")],
    }


@pytest.fixture(autouse=True)
def left_as_found() -> Iterator[None]:
    """Every test here must leave the process as it was, whatever went wrong inside."""
    before = process_state()
    yield
    assert process_state() == before


def fault(program: Program, world_size: int) -> SimulationError:
    """What ``simulate`` raises, which it must do within a second."""
    start = time.monotonic()
    with pytest.raises(SimulationError) as error:
        simulate(program, world_size)
    assert time.monotonic() - start < 1
    return error.value


def site(function: Any, text: str) -> str:
    """``file:line`` of the first line of ``function`` with ``text`` in it."""
    lines, start = inspect.getsourcelines(function)
    return f"{__file__}:{start + next(i for i, line in enumerate(lines) if text in line)}"


def who_and_sum(group: Group, offset: int) -> tuple[int, ...]:
    total = all_reduce(torch.tensor([group.rank + offset]), group=group).item()
    return group.rank, group.world_size, dist.get_rank(), dist.get_world_size(), total


@pytest.mark.parametrize("world_size", [1, 3, 64])
def test_results_come_in_rank_order(world_size: int) -> None:
    total = world_size * (world_size - 1) // 2 + 10 * world_size
    want = [(rank, world_size, rank, world_size, total) for rank in range(world_size)]
    assert simulate(who_and_sum, world_size, 10) == want


def draws(group: Group) -> list[tuple[float, float, float]]:
    seed, out = 42 + group.rank, []
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    for step in range(4):
        out.append((torch.rand(1).item(), np.random.rand(), random.random()))
        if step % 2:
            all_reduce(torch.ones(1), group=group)
        else:
            barrier(group)
    return out


def test_each_rank_has_its_own_random_state() -> None:
    for rank, got in enumerate(simulate(draws, 3)):
        torchs, numpys, pythons = torch.Generator(), np.random.RandomState(42 + rank), random.Random(42 + rank)
        torchs.manual_seed(42 + rank)
        assert got == [(torch.rand(1, generator=torchs).item(), numpys.rand(), pythons.random()) for _ in range(4)]


@pytest.mark.parametrize("num_shards, inside", [(None, 2), (2, 1)])
def test_num_shards_sets_one_thread(num_shards: int | None, inside: int) -> None:
    torch.set_num_threads(2)
    try:
        assert simulate(lambda g: torch.get_num_threads(), 2, num_shards=num_shards) == [inside] * 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_settings_that_a_program_changes_are_restored() -> None:
    def program(group: Group) -> None:
        torch.set_num_threads(3)
        torch.set_default_dtype(torch.float64)

    before = process_state()
    simulate(program, 2)
    after = process_state()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    assert after == before


MISMATCHES: dict[str, tuple[tuple[Callable[[], Any], str], ...]] = {
    "op": (
        (lambda: dist.all_reduce(torch.ones(2)), "all_reduce(SUM, float32[2])"),
        (lambda: dist.broadcast(torch.ones(2), 0), "broadcast(root=0, float32[2])"),
    ),
    "shape": (
        (lambda: dist.all_reduce(torch.ones(2, 3)), "all_reduce(SUM, float32[2, 3])"),
        (lambda: dist.all_reduce(torch.ones(3, 2)), "all_reduce(SUM, float32[3, 2])"),
    ),
    "dtype": (
        (lambda: dist.all_reduce(torch.ones(2).half()), "all_reduce(SUM, float16[2])"),
        (lambda: dist.all_reduce(torch.ones(2).bfloat16()), "all_reduce(SUM, bfloat16[2])"),
    ),
    "reduce-op": (
        (lambda: dist.all_reduce(torch.ones(2)), "all_reduce(SUM, float32[2])"),
        (lambda: dist.all_reduce(torch.ones(2), op=dist.ReduceOp.MAX), "all_reduce(MAX, float32[2])"),
    ),
    "root": (
        (lambda: dist.reduce(torch.ones(2), 0), "reduce(SUM, root=0, float32[2])"),
        (lambda: dist.reduce(torch.ones(2), 1), "reduce(SUM, root=1, float32[2])"),
    ),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_mismatched_calls_are_named(kind: str) -> None:
    text = str(fault(lambda g: MISMATCHES[kind][g.rank][0](), 2))
    assert "mismatched collectives (collective 1 of group world [0, 1])" in text
    for rank, (call, name) in enumerate(MISMATCHES[kind]):
        assert f"rank {rank}: {name} at {site(call, 'lambda')}" in text


def to_list(function: Callable[..., Any]) -> None:
    """``function(out, tensor)`` with received tensors of 3 elements where 1 is sent."""
    function([torch.zeros(3), torch.zeros(3)], torch.ones(1))


DO_NOT_FIT: dict[str, Program] = {
    "all_gather": lambda g: to_list(dist.all_gather),
    "gather": lambda g: to_list(lambda out, x: dist.gather(x, out if g.rank == 0 else None)),
    "scatter": lambda g: dist.scatter(torch.zeros(3), [torch.ones(1)] * 2 if g.rank == 0 else None),
    "all_to_all": lambda g: dist.all_to_all_single(torch.zeros(4), torch.ones(2), [1, 3], [1, 1]),
    "reduce_scatter": lambda g: dist.reduce_scatter(torch.zeros(3), [torch.ones(1)] * 2),
}


@pytest.mark.parametrize("name", DO_NOT_FIT)
def test_sent_tensors_that_do_not_fit_are_refused(name: str) -> None:
    assert name in str(fault(DO_NOT_FIT[name], 2))


def leaves_early(group: Group) -> None:
    if group.rank != 1:
        all_reduce(torch.ones(2), group=group)


def test_early_return_is_named() -> None:
    text = str(fault(leaves_early, 3))
    assert "ranks [1] have already returned" in text
    for rank in (0, 2):
        call = f"rank {rank}: all_reduce(SUM, float32[2]) at {site(leaves_early, 'all_reduce')}"
        assert f"{call}; collective 1 of group world [0, 1, 2] lacks ranks [1]" in text


def crosses_groups(group: Group) -> None:
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    if group.rank == 0:
        dist.all_reduce(torch.ones(1), group=first)
    dist.barrier(second)
    if group.rank == 1:
        dist.all_reduce(torch.ones(1), group=first)


def test_crossed_groups_are_named() -> None:
    text = str(fault(crosses_groups, 2))
    reduces, waits = site(crosses_groups, "all_reduce"), site(crosses_groups, "barrier")
    assert "deadlock: every running rank waits\n" in text
    assert f"rank 0: all_reduce(SUM, float32[1]) at {reduces}; collective 1 of group new_group 1 [0, 1] lacks" in text
    assert f"rank 1: barrier() at {waits}; collective 1 of group new_group 2 [0, 1] lacks ranks [0]" in text


def backward_mismatch(group: Group) -> None:
    y = copy_to_region(torch.ones(2 + group.rank, requires_grad=True), group=group)
    y.sum().backward()


def test_mismatch_in_backward_is_named() -> None:
    text = str(fault(backward_mismatch, 2))
    for rank in range(2):
        assert f"rank {rank}: all_reduce(SUM, float32[{2 + rank}]) at {site(backward_mismatch, 'backward()')}" in text


def forward(group: Group) -> None:
    all_gather(torch.ones(1), group=group)


def backward(group: Group) -> None:
    copy_to_region(torch.ones(1, requires_grad=True), group=group).sum().backward()


@pytest.mark.parametrize("error", [KeyError("seventeen"), SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("others", [forward, backward])
def test_an_exception_ends_all_ranks(error: BaseException, others: Program) -> None:
    unwound = []

    def program(group: Group) -> None:
        try:
            if group.rank == 1:
                raise error
            others(group)
        finally:
            unwound.append(group.rank)

    raised = fault(program, 4)
    assert f"rank 1 raised {type(error).__name__}: {error}" in str(raised)
    assert raised.__cause__ is error
    assert sorted(unwound) == [0, 1, 2, 3]


def test_a_swallowed_fault_comes_back() -> None:
    caught = []

    def program(group: Group) -> str:
        for size in (1 + group.rank, 1, 1):
            try:
                all_reduce(torch.ones(size), group=group)
            except SimulationError:
                caught.append(group.rank)
        return "done"

    assert "float32[2]" in str(fault(program, 2))
    assert sorted(caught) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("world_size", [1, 3])
def test_interrupting_ends_the_ranks(world_size: int) -> None:
    ended = []

    def program(group: Group) -> None:
        try:
            torch.manual_seed(group.rank)
            time.sleep(0.3)
            barrier(group)
        finally:
            ended.append(group.rank)

    signal.setitimer(signal.ITIMER_REAL, 0.1, 20)
    with pytest.raises(TimeoutError):
        simulate(program, world_size)
    assert sorted(ended) == list(range(world_size))


def test_simulations_do_not_nest() -> None:
    raised = fault(lambda g: simulate(leaves_early, 2), 2)
    assert isinstance(raised.__cause__, RuntimeError) and "simulations do not nest" in str(raised)


@pytest.mark.parametrize("collective", [all_reduce, all_gather, lambda x, group: barrier(group)])
def test_collectives_after_the_end(collective: Callable[..., Any]) -> None:
    for group in simulate(lambda g: g, 2):
        with pytest.raises(
            SimulationError, match="called from thread 'MainThread', which is no rank of this simulation"
        ):
            collective(torch.ones(1), group=group)


def test_collectives_from_another_thread() -> None:
    def program(group: Group) -> str:
        errors: list[str] = []

        def call() -> None:
            try:
                all_reduce(torch.ones(1), group=group)
            except SimulationError as error:
                errors.append(str(error))

        helper = threading.Thread(target=call, name="helper")
        helper.start()
        helper.join()
        return errors[0]

    for text in simulate(program, 2):
        assert "collective called from thread 'helper', which is no rank of this simulation" in text


def test_simulation_beside_a_real_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="needs a process without a default process group; destroy it first"):
            simulate(leaves_early, 2)
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()


def test_no_ranks() -> None:
    with pytest.raises(ValueError, match="world_size=0 must be at least 1"):
        simulate(leaves_early, 0)


def crossed_waits(group: Group) -> tuple[Tensor, Tensor]:
    groups = [dist.new_group(range(group.world_size)) for _ in range(2)]
    tensors = [torch.tensor([10.0**k * (group.rank + 1)]) for k in range(2)]
    order = [0, 1] if group.rank % 2 == 0 else [1, 0]
    works = {k: dist.all_reduce(tensors[k], group=groups[k], async_op=True) for k in order}
    for k in order:
        works[k].wait()
    return tensors[0], tensors[1]


def test_async_work_on_two_groups() -> None:
    assert simulate(crossed_waits, 4) == [(torch.tensor([10.0]), torch.tensor([100.0]))] * 4


def test_an_output_is_there_after_wait_only() -> None:
    def program(group: Group) -> tuple[bool, float, float]:
        x = torch.ones(1)
        work = dist.all_reduce(x, async_op=True)
        early = work.is_completed(), x.item()
        work.wait()
        return *early, x.item()

    assert simulate(program, 2) == [(False, 1.0, 2.0), (True, 2.0, 2.0)]


def subgroups(group: Group) -> tuple[int, int, list[float]]:
    outer = dist.new_group([1, 3])
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    sums = [all_reduce(torch.tensor([2.0**group.rank]), group=Group(mesh[name])).item() for name in mesh.mesh_dim_names]
    return dist.get_rank(outer), dist.get_world_size(outer), [*sums, mesh.get_local_rank("rows")]


def test_new_group_and_device_mesh() -> None:
    assert simulate(subgroups, 4) == [
        (-1, -1, [1.0 + 4.0, 1.0 + 2.0, 0]),
        (0, 2, [2.0 + 8.0, 1.0 + 2.0, 0]),
        (-1, -1, [1.0 + 4.0, 4.0 + 8.0, 1]),
        (1, 2, [2.0 + 8.0, 4.0 + 8.0, 1]),
    ]


def objects(group: Group) -> tuple[Any, ...]:
    mine = {"rank": group.rank, "text": "x" * group.rank}
    everything: list[Any] = [None] * group.world_size
    dist.all_gather_object(everything, mine)
    gathered: list[Any] | None = [None] * group.world_size if group.rank == 1 else None
    dist.gather_object(mine, gathered, dst=1)
    sent = [mine]
    dist.broadcast_object_list(sent, src=2)
    received: list[Any] = [None]
    dist.scatter_object_list(received, everything[::-1] if group.rank == 0 else None, src=0)
    return everything, gathered, sent[0], received[0]


def test_object_collectives() -> None:
    want = [{"rank": rank, "text": "x" * rank} for rank in range(3)]
    got = simulate(objects, 3)
    assert got == [(want, want if rank == 1 else None, want[2], want[2 - rank]) for rank in range(3)]


def functional_collectives(group: Group) -> list[list[float]]:
    x = torch.arange(4.0) + 10 * group.rank
    total = functional.all_reduce(x, "sum", dist.group.WORLD)
    whole = functional.all_gather_tensor(x, 0, dist.group.WORLD)
    mine = functional.reduce_scatter_tensor(x, "sum", 0, dist.group.WORLD)
    return [(out * 1).tolist() for out in (total, whole, mine)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_functional_collectives() -> None:
    total, whole = [10.0, 12.0, 14.0, 16.0], [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]
    assert simulate(functional_collectives, 2) == [[total, whole, total[:2]], [total, whole, total[2:]]]


def differentiable(group: Group) -> tuple[list[float], list[float]]:
    x = torch.full((2,), group.rank + 1.0, requires_grad=True)
    y = dist_nn.all_reduce(x)
    ((group.rank + 1) * y).sum().backward()
    return y.tolist(), x.grad.tolist()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_differentiable_collectives_of_torch() -> None:
    assert simulate(differentiable, 3) == [([6.0, 6.0], [6.0, 6.0])] * 3


def network() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double(), torch.randn(12, 8).double()


def data_parallel(group: Group) -> dict[str, Tensor]:
    model, x = network()
    replica = DistributedDataParallel(model)
    replica(x.chunk(group.world_size)[group.rank]).pow(2).sum().backward()
    return {name: p.grad * group.world_size for name, p in model.named_parameters()}


def tensor_parallel(group: Group) -> dict[str, Tensor]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, x = network()
    mesh = dist.init_device_mesh("cpu", (group.world_size,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    y = model(x) * 1
    y.pow(2).sum().backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()} | {"y": y.detach()}


@pytest.mark.parametrize("program", [data_parallel, tensor_parallel])
def test_parallelism_of_torch(program: Program) -> None:
    with torch.random.fork_rng():
        model, x = network()
    y = model(x)
    y.pow(2).sum().backward()
    want = {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters()}
    for got in simulate(program, 4):
        assert got.keys() >= want.keys() - {"y"}
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=1e-12, atol=1e-12)


def test_compiled_functions_are_not_shared_between_ranks() -> None:
    compiled = torch.compile(lambda x: x + dist.get_rank(), backend="eager")
    assert simulate(lambda g: compiled(torch.zeros(1)).item(), 3) == [0.0, 1.0, 2.0]


FIRST_COMPILED_INSIDE = """
import torch
from src import simulate

rank = torch.distributed.get_rank
compile = lambda: torch.compile(lambda x: x + rank(), backend="eager")
print(simulate(lambda g: compile()(torch.zeros(1)).item(), 3))
"""


def test_the_first_compilation_of_a_process_may_be_inside() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", FIRST_COMPILED_INSIDE], cwd=root, capture_output=True, text=True)
    assert done.stdout == "[0.0, 1.0, 2.0]\n", done.stderr


def gather(x: Tensor, group: Group) -> Any:
    out = [torch.empty_like(x) for _ in range(group.world_size)] if group.rank == 1 else None
    dist.gather(x, out, dst=1)
    return out


def scatter(x: Tensor, group: Group) -> Any:
    out = torch.empty_like(x[0])
    dist.scatter(out, list(x) if group.rank == 2 else None, src=2)
    return out


def reduce(x: Tensor, group: Group) -> Any:
    dist.reduce(x, dst=3)
    return x if group.rank == 3 else None


def reduce_op(op: Any, dtype: torch.dtype, x: Tensor, group: Group) -> Any:
    x = (x * 4).to(dtype)
    dist.all_reduce(x, op=op)
    return x


def reduce_scatter(x: Tensor, group: Group) -> Any:
    out = torch.empty_like(x[0])
    dist.reduce_scatter(out, list(x))
    return out


def reduce_scatter_flat(x: Tensor, group: Group) -> Any:
    out = torch.empty_like(x[0])
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(out, x.view(-1))
    return out


def all_to_all(x: Tensor, group: Group) -> Any:
    out = list(torch.empty_like(x))
    dist.all_to_all(out, list(x))
    return out


def all_to_all_single(rows: int, x: Tensor, group: Group) -> Any:
    x = x.flatten()[: rows * group.world_size]
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


def all_to_all_with_splits(x: Tensor, group: Group) -> Any:
    sizes = [(group.rank + other) % 3 for other in range(group.world_size)]
    out = x.new_empty(sum(sizes), 2)
    dist.all_to_all_single(out, x.view(-1)[: 2 * sum(sizes)].view(-1, 2), sizes, sizes)
    return out


def transposed(x: Tensor, group: Group) -> Any:
    x = x.round().t()
    dist.all_reduce(x)
    dist.broadcast(x, 1)
    return x


def coalesced(x: Tensor, group: Group) -> Any:
    tensors = [x.round(), x[:2].round()]
    dist.all_reduce_coalesced(tensors)
    return tensors


REDUCE_OPS = [
    functools.partial(reduce_op, getattr(dist.ReduceOp, name), dtype)
    for dtype, names in {
        torch.float32: ["AVG", "MAX", "MIN"],
        torch.int64: ["SUM", "PRODUCT", "MAX", "MIN", "BAND", "BOR", "BXOR"],
    }.items()
    for name in names
]
OPERATIONS = [
    gather,
    scatter,
    reduce,
    *REDUCE_OPS,
    reduce_scatter,
    reduce_scatter_flat,
    all_to_all,
    functools.partial(all_to_all_single, 5),
    functools.partial(all_to_all_single, 0),
    all_to_all_with_splits,
    transposed,
    coalesced,
]


def operate(group: Group, operation: Callable[[Tensor, Group], Any]) -> Any:
    x = torch.randn(group.world_size, 7, generator=torch.Generator().manual_seed(group.rank)) * 3**group.rank
    return operation(x, group)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "operation", OPERATIONS, ids=lambda o: getattr(o, "__name__", None) or f"{o.func.__name__}{o.args}"
)
def test_same_bits_as_gloo(on_ranks: OnRanks, operation: Any) -> None:
    real, simulated = (on_ranks((kind, 4), operate, operation) for kind in ("gloo", "simulated"))
    torch.testing.assert_close(simulated, real, rtol=0, atol=0)
