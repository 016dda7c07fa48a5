"""Collectives through shared memory: the backend's bits, faults that are named, and nothing left behind."""

from __future__ import annotations

import gc
import itertools
import os
import platform
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from src import Group, init
from src.distributed import (
    RankFailure,
    all_gather,
    all_reduce,
    broadcast,
    reduce_scatter,
    shared_collectives,
    shared_memory,
)
from src.distributed.failure import set_timeout
from src.distributed.shared_collectives import RING_BYTES, WHOLE_BYTES
from src.distributed.shared_memory import SLOT_BYTES
from src.testing import RankPool, Ranks

SUM, MAX, MIN = dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    """Processes apart from those of other tests: what runs here may leave them in any state."""
    pool = RankPool("gloo", 2, timeout=60)
    yield pool
    pool.close()


def through_backend(program: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What ``program`` gives where memory serves no tensor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_collectives, "serves", lambda tensor: False)
        return program(*args, **options)


def values(group: Group, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(group.rank)
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 3**group.rank).to(dtype)
    return torch.randint(0, 256, shape, generator=generator).to(dtype)


def every_collective(group: Group, x: Tensor) -> dict[str, Tensor]:
    results = {op.name: all_reduce(x, group=group, op=op) for op in (SUM, MAX, MIN)}
    for src in range(group.world_size):
        results[f"broadcast {src}"] = broadcast(x, group=group, src=src)
    for dim in range(x.dim()):
        results[f"all_gather {dim}"] = all_gather(x, group=group, dim=dim)
        if x.shape[dim] % group.world_size == 0:
            results[f"reduce_scatter {dim}"] = reduce_scatter(x, group=group, dim=dim)
    return results


def turns(group: Group) -> int:
    memory = shared_memory.of(group.pg)
    assert memory is not None
    return memory._turn


def differing(group: Group, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> list[str]:
    """The collectives of which shared memory and the backend give different tensors."""
    wrong = []
    for dtype, shape in itertools.product(dtypes, shapes):
        x = values(group, shape, dtype)
        if len(shape) == 3:
            x = x.transpose(0, 2)
        kept, before = x.clone(), turns(group)
        shared = every_collective(group, x)
        assert turns(group) - before >= len(shared)
        before = turns(group)
        plain = through_backend(every_collective, group, x)
        assert turns(group) == before and shared.keys() == plain.keys()
        for name, want in plain.items():
            got = shared[name]
            same = got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()
            if not (same and torch.equal(got, want)):
                wrong.append(f"{name} {shape} {dtype}")
        assert torch.equal(x, kept)
    return wrong


SHAPES = [(), (1,), (7,), (0, 4), (12, 5), (4, 3, 12), (240, 7), (101, 97)]


@pytest.mark.ranks(gloo=(2, 3, 4), simulated=())
@pytest.mark.parametrize("reduce_order", ["backend", "tree"])
def test_the_bits_of_the_backend(ranks: Ranks, reduce_order: str) -> None:
    assert ranks(differing, SHAPES, [*shared_memory.DTYPES], reduce_order=reduce_order) == [[]] * ranks.world_size


def sizes_around_limits(itemsize: int) -> list[tuple[int, ...]]:
    slot, whole = SLOT_BYTES // itemsize, WHOLE_BYTES // itemsize
    sizes = [whole - 1, whole, whole + 1, slot // 4 + 1, slot - 1, slot, slot + 1, 2 * slot + 12, 3 * slot]
    return [(size,) for size in sizes]


@pytest.mark.ranks(gloo=(2, 4), simulated=())
@pytest.mark.parametrize("reduce_order", ["backend", "tree"])
def test_the_bits_of_the_backend_over_several_turns(ranks: Ranks, reduce_order: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        wrong = ranks(differing, sizes_around_limits(dtype.itemsize), [dtype], reduce_order=reduce_order)
        assert wrong == [[]] * ranks.world_size


def turns_of_large_sum(group: Group, nbytes: int) -> int:
    x, before = torch.ones(nbytes // 4), turns(group)
    assert torch.equal(all_reduce(x, group=group), torch.full_like(x, group.world_size))
    return turns(group) - before


def test_sums_whose_order_is_not_known_are_left_to_the_backend(ranks: Ranks) -> None:
    assert ranks.on("gloo", 2)(turns_of_large_sum, RING_BYTES + 4) == [25, 25]
    assert ranks.on("gloo", 3)(turns_of_large_sum, RING_BYTES) == [48] * 3
    assert ranks.on("gloo", 3)(turns_of_large_sum, RING_BYTES + 4) == [0] * 3
    assert ranks.on("gloo", 3)(turns_of_large_sum, RING_BYTES + 4, reduce_order="tree") == [50] * 3


def results_stay(group: Group) -> bool:
    ones = torch.ones(SLOT_BYTES // 4) * (group.rank + 1)
    first, copies = every_collective(group, ones), every_collective(group, ones)
    for number in range(4):
        every_collective(group, ones * number)
    return all(torch.equal(first[name], copies[name]) for name in first) and bool((first["all_gather 0"] > 0).all())


def test_results_have_memory_of_their_own(ranks: Ranks) -> None:
    assert ranks.on("gloo", 2)(results_stay) == [True, True]


def unserved(group: Group) -> list[Any]:
    before = turns(group)
    flags = all_gather(torch.tensor([group.rank == 0]), group=group)
    numbers = all_gather(torch.tensor([group.rank + 1j]), group=group)
    product = all_reduce(torch.tensor([group.rank + 2]), group=group, op=dist.ReduceOp.PRODUCT)
    return [*flags.tolist(), *numbers.tolist(), *product.tolist(), turns(group) - before]


def test_the_backend_has_the_rest(ranks: Ranks) -> None:
    assert ranks.on("gloo", 2)(unserved) == [[True, False, 1j, 1 + 1j, 6, 0]] * 2


def modes(group: Group) -> list[bool]:
    """First used in inference mode, then with gradients."""
    with torch.inference_mode():
        inferred = all_reduce(torch.ones(3), group=group)
    leaf = torch.ones(3, requires_grad=True)
    results = every_collective(group, leaf * 2)
    again = all_reduce(torch.ones(3), group=group)
    return [inferred.is_inference(), any(r.requires_grad for r in results.values()), torch.equal(inferred, again)]


def test_inference_mode_and_gradients(two: RankPool) -> None:
    two.close()
    assert two.run(modes) == [[True, False, True]] * 2


def in_turns_with_the_backend(group: Group) -> list[float]:
    found = []
    for step in range(20):
        found.append(all_reduce(torch.tensor(float(step)), group=group).item())
        x = torch.tensor(float(step))
        work = dist.all_reduce(x, async_op=True)
        found.append(all_gather(torch.tensor([float(group.rank)]), group=group).sum().item())
        work.wait()
        found.append(x.item())
        dist.barrier()
    return found


def test_both_ways_keep_one_order(ranks: Ranks) -> None:
    want = [value for step in range(20) for value in (3.0 * step, 3.0, 3.0 * step)]
    assert ranks.on("gloo", 3)(in_turns_with_the_backend) == [want] * 3


def open_files(group: Group) -> int:
    gc.collect()
    return len([name for name in os.listdir("/proc/self/fd") if "isoshard" in _target(name)])


def _target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


def many_groups(group: Group) -> tuple[list[float], int]:
    found = []
    before = open_files(group)
    for _ in range(5):
        pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [3, 0])]
        for pg in pairs:
            if dist.get_rank(pg) >= 0:
                member = Group(pg)
                assert turns(member) == 1
                found.append(all_reduce(torch.tensor(float(group.rank)), group=member).item())
        dist.barrier()
        assert open_files(group) > before
        del member
        for pg in pairs:
            dist.destroy_process_group(pg)
        pairs.clear()
        del pg
    return found, open_files(group) - before


def test_groups_that_come_and_go(ranks: Ranks) -> None:
    sums = {0: [1.0, 3.0], 1: [1.0], 2: [5.0], 3: [5.0, 3.0]}
    assert ranks.on("gloo", 4)(many_groups) == [(sums[rank] * 5, 0) for rank in range(4)]


def begin_again(group: Group, port: int, **options: Any) -> Group:
    """A default group with a store of its own, by ``init``."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return init(device="cpu", timeout=timedelta(seconds=50), **options)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def default_group_anew(group: Group, port: int, environ: str | None, options: dict[str, Any]) -> list[Any]:
    first = all_reduce(torch.ones(2), group=group).tolist()
    with pytest.MonkeyPatch.context() as patch:
        if environ is not None:
            patch.setenv("ISOSHARD_SHARED_MEMORY", environ)
        group = begin_again(group, port, **options)
    second = all_reduce(torch.ones(2), group=group).tolist()
    pair = Group(dist.new_group([0, 1]))
    third = all_reduce(torch.ones(2), group=pair).tolist()
    return [first, second, third, *(shared_memory.of(g.pg) is not None for g in (group, pair))]


@pytest.mark.parametrize(
    "environ, options, shares",
    [
        (None, {}, True),
        ("1", {}, True),
        ("0", {}, False),
        ("0", {"shared_memory": True}, True),
        (None, {"shared_memory": False}, False),
        (None, {"check": True}, False),
    ],
)
def test_a_new_default_group_and_the_switch(
    two: RankPool, environ: str | None, options: dict[str, Any], shares: bool
) -> None:
    want = [[2.0, 2.0]] * 3 + [shares, shares]
    assert two.run(default_group_anew, free_port(), environ, options) == [want] * 2


def in_different_places(group: Group, name: str, value: Any) -> tuple[bool, float]:
    with pytest.MonkeyPatch.context() as patch:
        if group.rank == 1:
            patch.setattr({"_place": shared_memory, "machine": platform, "open": os}[name], name, value)
        pair = Group(dist.new_group([0, 1]))
        shares = shared_memory.of(pair.pg) is not None
    return shares, all_reduce(torch.tensor(1.0), group=pair).item()


def elsewhere() -> str:
    return "another host"


def arm() -> str:
    return "aarch64"


def refuse(*args: Any) -> int:
    raise PermissionError("not allowed")


@pytest.mark.parametrize("name, value", [("_place", elsewhere), ("machine", arm), ("open", refuse)])
def test_all_ranks_leave_it_where_one_cannot(ranks: Ranks, name: str, value: Any) -> None:
    assert ranks.on("gloo", 2)(in_different_places, name, value) == [(False, 2.0)] * 2


def calls_of(rank: int, group: Group) -> dict[str, Callable[[], Tensor]]:
    """One call for each kind of disagreement: of rank 0 and of the others."""
    other = rank > 0
    return {
        "op": lambda: all_gather(torch.ones(4), group=group) if other else all_reduce(torch.ones(4), group=group),
        "reduce-op": lambda: all_reduce(torch.ones(4), group=group, op=MAX if other else SUM),
        "dtype": lambda: all_reduce(torch.ones(4).to(torch.float16 if other else torch.bfloat16), group=group),
        "size": lambda: all_gather(torch.ones(5 if other else 4), group=group),
        "turns": lambda: all_reduce(torch.ones(2 * SLOT_BYTES if other else 4), group=group),
        "root": lambda: broadcast(torch.ones(4), group=group, src=rank),
    }


def disagree(group: Group, port: int, kind: str) -> list[str]:
    group, told = begin_again(group, port), []
    for _ in range(2):
        try:
            calls_of(group.rank, group)[kind]()
        except RankFailure as error:
            told.append(str(error))
    return told


DISAGREEMENTS = {
    "op": ("all_reduce SUM of 16 bytes of float32", "all_gather of 16 bytes of float32"),
    "reduce-op": ("all_reduce SUM of 16 bytes of float32", "all_reduce MAX of 16 bytes of float32"),
    "dtype": ("all_reduce SUM of 8 bytes of bfloat16", "all_reduce SUM of 8 bytes of float16"),
    "size": ("all_gather of 16 bytes of float32", "all_gather of 20 bytes of float32"),
    "turns": ("all_reduce SUM of 16 bytes of float32", f"all_reduce SUM of {8 * SLOT_BYTES} bytes of float32"),
    "root": ("broadcast from rank 0 of the group of 16 bytes of float32", "broadcast from rank 1 of the group of 16"),
}


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_ranks_in_different_calls_are_told_both(two: RankPool, kind: str) -> None:
    for told in two.run(disagree, free_port(), kind):
        first, second = told
        assert "all ranks are there, but not in the same call" in first
        for rank, text in enumerate(DISAGREEMENTS[kind]):
            assert f"rank {rank} {'is ' * (f'rank {rank} is' in first)}in {text}" in first, first
            assert f"\n  rank {rank}: " in first
        assert "an earlier collective of this group has failed" in second


def one_fails(group: Group, port: int, leaves: bool) -> str:
    """Rank 1 leaves, or waits until rank 0 has given up."""
    group = begin_again(group, port)
    store = dist.distributed_c10d._get_default_store()
    all_reduce(torch.ones(4), group=group)
    if group.rank == 0:
        set_timeout(group.pg, timedelta(seconds=50 if leaves else 1))
        try:
            all_reduce(torch.ones(4), group=group)
        except RankFailure as error:
            store.set("given up", "yes")
            return str(error)
    if leaves:
        with pytest.raises(KeyboardInterrupt), shared_memory.of(group.pg):
            raise KeyboardInterrupt
    store.wait(["given up"], timedelta(seconds=50))
    return ""


@pytest.mark.parametrize(
    "leaves, words", [(True, "rank 1 has left the memory"), (False, "rank 1 did not come within 1 s")]
)
def test_a_rank_that_is_missing_is_named(two: RankPool, leaves: bool, words: str) -> None:
    told, _ = two.run(one_fails, free_port(), leaves)
    assert "all_reduce(float32[4]) forward, at" in told and "rank 1 ended, or hang" in told
    assert words in told


def one_calls_torch(group: Group, port: int, shares: bool) -> str:
    """Rank 1 is in torch's own collective; where rank 0 gives up, it meets it there."""
    group, x = begin_again(group, port, shared_memory=shares), torch.ones(4)
    all_reduce(x, group=group)
    if group.rank == 1:
        dist.all_reduce(x)
        return ""
    if shares:
        set_timeout(group.pg, timedelta(seconds=1))
    try:
        all_reduce(x, group=group)
    except RankFailure as error:
        dist.all_reduce(x)
        return str(error)
    return ""


@pytest.mark.parametrize("shares", [True, False])
def test_a_rank_in_a_collective_of_torch_is_guessed(two: RankPool, shares: bool) -> None:
    told, _ = two.run(one_calls_torch, free_port(), shares)
    assert bool(told) == shares
    if shares:
        assert "rank 1 did not come within 1 s; it may be in a collective of torch.distributed, " in told
        assert told.endswith("meets this one only with init(shared_memory=False)")
