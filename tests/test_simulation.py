"""Simulated ranks: results, random states, what is found wrong with a program, and what stays behind (nothing)."""

from __future__ import annotations

import inspect
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from src import Group, SimulationError, init, simulate
from src.distributed import all_gather, all_reduce, barrier, copy_to_region

from .conftest import process_state

Program = Callable[[Group], Any]


pytestmark = pytest.mark.usefixtures("left_as_found")


def fault(program: Program, world_size: int) -> SimulationError:
    """What ``simulate`` raises."""
    with pytest.raises(SimulationError) as error:
        simulate(program, world_size)
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


def normals(group: Group, seeded: bool) -> list[float]:
    if seeded:
        np.random.seed(group.rank)
    out = []
    for step in range(6):
        if (step + group.rank) % 3:
            out.append(np.random.normal())
        barrier(group)
    return out


@pytest.mark.parametrize("seeded", [True, False])
def test_numpys_second_normal_number_belongs_to_its_rank(seeded: bool) -> None:
    outside = np.random.get_state()
    np.random.seed(7)
    np.random.normal()
    before = np.random.get_state()
    results = simulate(normals, 3, seeded)
    np.random.set_state(outside)
    for rank, got in enumerate(results):
        source = np.random.RandomState(rank)
        if not seeded:
            source.set_state(before)
        assert got == [source.normal() for _ in range(4)]


def gaussians(group: Group) -> list[float]:
    out = []
    random.seed(group.rank)
    for step in range(6):
        if (step + group.rank) % 3:
            out.append(random.gauss(0, 1))
        barrier(group)
    return out


def test_pythons_second_normal_number_belongs_to_its_rank() -> None:
    before = random.getstate()
    for rank, got in enumerate(simulate(gaussians, 3)):
        source = random.Random(rank)
        assert got == [source.gauss(0, 1) for _ in range(4)]
    assert random.getstate() == before


def test_python_states_are_kept_where_their_memory_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.distributed.rank_state._python_generator", lambda: None)
    test_each_rank_has_its_own_random_state()
    test_pythons_second_normal_number_belongs_to_its_rank()


@pytest.mark.parametrize("num_shards, inside", [(None, 2), (2, 1)])
def test_num_shards_sets_one_thread(num_shards: int | None, inside: int) -> None:
    torch.set_num_threads(2)
    try:
        assert simulate(lambda g: torch.get_num_threads(), 2, num_shards=num_shards) == [inside] * 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def product(group: Group | None = None) -> Tensor:
    """A matrix product whose bits depend on the number of threads on some machines."""
    left, right = (torch.randn(n, m, generator=torch.Generator().manual_seed(0)) for n, m in ((6, 72), (72, 32)))
    return left @ right


@pytest.mark.parametrize("threads, num_shards", [(1, None), (2, None), (1, 2), (2, 2)])
def test_ranks_compute_with_the_threads_that_torch_reports(threads: int, num_shards: int | None) -> None:
    torch.set_num_threads(1 if num_shards else threads)
    want = product()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(got, want) for got in simulate(product, 2, num_shards=num_shards))
    finally:
        torch.set_num_threads(1)


def defaults(group: Group) -> list[tuple[int, str]]:
    return [(g.num_shards, g.reduce_order) for g in (group, init(), Group(), Group(num_shards=2))]


def test_groups_inside_take_what_simulate_was_given() -> None:
    assert simulate(defaults, 2, num_shards=8) == [[(8, "tree")] * 3 + [(2, "tree")]] * 2
    assert simulate(defaults, 2) == [[(2, "backend")] * 3 + [(2, "tree")]] * 2


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
    "operations": (
        (lambda: dist.all_reduce(torch.ones(2)), "all_reduce(SUM, float32[2])"),
        (lambda: dist.broadcast(torch.ones(2), 0), "broadcast(root=0, float32[2])"),
    ),
    "shapes": (
        (lambda: dist.all_reduce(torch.ones(2, 3)), "all_reduce(SUM, float32[2, 3])"),
        (lambda: dist.all_reduce(torch.ones(3, 2)), "all_reduce(SUM, float32[3, 2])"),
    ),
    "dtypes": (
        (lambda: dist.all_reduce(torch.ones(2).half()), "all_reduce(SUM, float16[2])"),
        (lambda: dist.all_reduce(torch.ones(2).bfloat16()), "all_reduce(SUM, bfloat16[2])"),
    ),
    "reduce-ops": (
        (lambda: dist.all_reduce(torch.ones(2)), "all_reduce(SUM, float32[2])"),
        (lambda: dist.all_reduce(torch.ones(2), op=dist.ReduceOp.MAX), "all_reduce(MAX, float32[2])"),
    ),
    "roots": (
        (lambda: dist.reduce(torch.ones(2), 0), "reduce(SUM, root=0, float32[2])"),
        (lambda: dist.reduce(torch.ones(2), 1), "reduce(SUM, root=1, float32[2])"),
    ),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_mismatched_calls_are_named(kind: str) -> None:
    text = str(fault(lambda g: MISMATCHES[kind][g.rank][0](), 2))
    assert f"mismatched collectives (collective 1 of group world [0, 1]), different {kind}" in text
    for rank, (call, name) in enumerate(MISMATCHES[kind]):
        assert f"rank {rank}: {name} forward, at {site(call, 'lambda')}" in text


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
    assert "; rank 1 has already returned\n" in text and "rank 1 returned without any call" in text
    call = f"ranks 0, 2: all_reduce(SUM, float32[2]) forward, at {site(leaves_early, 'all_reduce')}"
    assert f"{call}; collective 1 of group world [0, 1, 2] lacks rank 1\n" in text


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
    assert "cycle: rank 0 waits for rank 1 waits for rank 0" in text
    assert f"rank 0: all_reduce(SUM, float32[1]) forward, at {reduces}; collective 1 of group new_group 1" in text
    assert f"rank 1: barrier() forward, at {waits}; collective 1 of group new_group 2 [0, 1] lacks rank 0" in text


def backward_mismatch(group: Group) -> None:
    y = copy_to_region(torch.ones(2 + group.rank, requires_grad=True), group=group)
    y.sum().backward()


def test_mismatch_in_backward_is_named() -> None:
    text = str(fault(backward_mismatch, 2))
    for rank in range(2):
        line = site(backward_mismatch, "backward()")
        assert f"rank {rank}: all_reduce(SUM, float32[{2 + rank}]) backward, at {line}" in text


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
    assert sorted(unwound) == [0, 1]  # ranks 2 and 3 had not begun


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


def interrupt_main() -> None:
    """SIGALRM to the thread that waits for the ranks; sent to the process it may wake another."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGALRM)


@pytest.mark.parametrize("world_size", [1, 3])
def test_interrupting_ends_the_ranks(world_size: int) -> None:
    ended = []

    def program(group: Group) -> None:
        try:
            torch.manual_seed(group.rank)
            interrupt_main()
            for _ in range(3000):
                time.sleep(0.01)
        finally:
            ended.append(group.rank)

    def stop(*_: Any) -> None:
        raise TimeoutError("time is up")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(TimeoutError):
            simulate(program, world_size)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended == [0]  # the others had not begun


def test_a_rank_that_computes_for_ever_is_named_and_ended() -> None:
    def program(group: Group) -> None:
        if group.rank:
            interrupt_main()
        while group.rank:
            pass

    def stop(*_: Any) -> None:
        raise TimeoutError("time is up")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(TimeoutError) as error:
            simulate(program, 3)
    finally:
        signal.signal(signal.SIGALRM, before)
    line = int(site(program, "pass").rpartition(":")[2])
    assert any(f"rank 1 was at {__file__}:{n}" in error.value.__notes__ for n in (line - 1, line))


def test_simulations_do_not_nest() -> None:
    raised = fault(lambda g: simulate(leaves_early, 2), 2)
    assert isinstance(raised.__cause__, RuntimeError) and "simulations do not nest" in str(raised)


@pytest.mark.parametrize("collective", [all_reduce, all_gather, lambda x, group: barrier(group)])
def test_collectives_after_the_end(collective: Callable[..., Any]) -> None:
    for group in simulate(lambda g: g, 2):
        with pytest.raises(RuntimeError, match="the process group of this Group has ended"):
            collective(torch.ones(1), group=group)


def calls_from_a_helper(group: Group) -> None:
    def call() -> None:
        with suppress(SimulationError):
            all_reduce(torch.ones(1), group=group)

    helper = threading.Thread(target=call, name="helper")
    helper.start()
    helper.join()


def test_collectives_from_another_thread() -> None:
    text = str(fault(calls_from_a_helper, 2))
    assert "all_reduce called from thread 'helper', which is no rank of this simulation" in text
    assert f"at {site(calls_from_a_helper, 'all_reduce')}; rank 0 was running" in text


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
