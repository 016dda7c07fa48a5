"""Group: where it comes from, what it knows, and how a process starts and ends."""

from __future__ import annotations

import copy
import pickle
import re
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

from src import Group, SimulationError, close, init, simulate
from src.distributed import all_reduce, local_device
from src.distributed.group import as_group, group_or_single
from src.testing import Ranks

Facts = tuple[int, int, int, str]


def facts(group: Group) -> Facts:
    return group.rank, group.world_size, group.num_shards, group.reduce_order


def total(group: Group) -> float:
    """The sum of the global ranks in ``group``: proves that it communicates with the ranks that it claims."""
    return all_reduce(torch.tensor([float(dist.get_rank())]), group=group).item()


def from_default(group: Group) -> tuple[Facts, Facts, float]:
    return facts(Group()), facts(group), total(Group())


@pytest.mark.ranks(1, 2, 4, gloo=2)
def test_default_group(ranks: Ranks) -> None:
    n = ranks.world_size
    for rank, (made, given, sum_of_ranks) in enumerate(ranks(from_default)):
        assert made == given == (rank, n, n, "backend")
        assert sum_of_ranks == n * (n - 1) / 2


def from_parts(group: Group, kind: str) -> tuple[Facts, float]:
    """Groups of neighbours {0, 1}, {2, 3}, …"""
    if kind == "mesh":
        mesh = dist.init_device_mesh("cpu", (group.world_size // 2, 2), mesh_dim_names=("outer", "tp"))
        part: Any = mesh["tp"]
    else:
        pairs = [dist.new_group([first, first + 1]) for first in range(0, group.world_size, 2)]
        part = pairs[group.rank // 2]
    inner = Group(part, num_shards=4)
    return facts(inner), total(inner)


@pytest.mark.ranks(2, 4, gloo=2)
@pytest.mark.parametrize("kind", ["mesh", "process group"])
def test_subgroup(ranks: Ranks, kind: str) -> None:
    for rank, (made, sum_of_ranks) in enumerate(ranks(from_parts, kind)):
        assert made == (rank % 2, 2, 4, "tree")
        assert sum_of_ranks == 2 * (rank - rank % 2) + 1


def not_a_member(group: Group) -> None:
    others = dist.new_group([0])
    if group.rank == 1:
        Group(others)


def test_not_a_member() -> None:
    with pytest.raises(SimulationError, match="rank=1 of the default group is not a member of the given process group"):
        simulate(not_a_member, 2)


def two_axes(group: Group) -> Group:
    return Group(dist.init_device_mesh("cpu", (2, 2)))


def test_what_is_no_group() -> None:
    with pytest.raises(SimulationError, match="ValueError: a DeviceMesh of 2 axes is no group"):
        simulate(two_axes, 4)
    with pytest.raises(TypeError, match="a ProcessGroup, a 1-D DeviceMesh or None was expected, not 'tp'"):
        Group("tp")


def test_world_of_one() -> None:
    assert facts(Group()) == facts(Group.single()) == (0, 1, 1, "backend")
    assert facts(Group(num_shards=4)) == facts(Group.single(4)) == (0, 1, 4, "tree")
    assert Group().pg is None


def single_inside(group: Group) -> tuple[Facts, float]:
    return facts(Group.single(2)), total(Group.single())


@pytest.mark.ranks(2)
def test_single_inside_an_initialised_job(ranks: Ranks) -> None:
    assert ranks(single_inside) == [((0, 1, 2, "tree"), float(rank)) for rank in range(2)]


def shards(group: Group) -> tuple[list[int], str]:
    return list(group.shards), group.reduce_order


@pytest.mark.ranks(1, 2, 4, 8, gloo=2)
def test_given_num_shards(ranks: Ranks) -> None:
    each = 8 // ranks.world_size
    want = [(list(range(rank * each, (rank + 1) * each)), "tree") for rank in range(ranks.world_size)]
    assert ranks(shards, num_shards=8) == want


def test_reduce_order() -> None:
    assert simulate(shards, 3) == [([rank], "backend") for rank in range(3)]
    assert simulate(shards, 3, reduce_order="tree") == [([rank], "tree") for rank in range(3)]
    assert simulate(shards, 3, num_shards=3, reduce_order="backend") == [([rank], "tree") for rank in range(3)]
    with pytest.raises(ValueError, match='reduce_order=\'ring\' is not "backend" or "tree"'):
        Group(reduce_order="ring")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make", [lambda v: Group(num_shards=v), Group.single, lambda v: simulate(facts, 1, num_shards=v)]
)
@pytest.mark.parametrize("num_shards, offered", [(0, 1), (6, 8)])
def test_num_shards_that_do_not_fit(make: Any, num_shards: int, offered: int) -> None:
    with pytest.raises(ValueError, match=f"num_shards={num_shards} must .*world_size=1, .*pass num_shards={offered}"):
        make(num_shards)


def test_num_shards_below_the_number_of_ranks() -> None:
    with pytest.raises(ValueError, match=r"num_shards=2 must .*world_size=4, .*pass num_shards=4"):
        simulate(facts, 4, num_shards=2)


def test_as_group() -> None:
    group = Group.single(4)
    assert as_group(group) is group and as_group(group, 4) is group
    assert facts(as_group(None, 2)) == (0, 1, 2, "tree")
    assert facts(group_or_single(None)) == (0, 1, 1, "backend")
    with pytest.raises(ValueError, match="num_shards=8 differs from num_shards=4 of the given group"):
        as_group(group, 8)


def none_is_single(group: Group) -> tuple[int, int]:
    return group_or_single(None).world_size, as_group(None).world_size


def test_none_inside_a_job() -> None:
    assert simulate(none_is_single, 2) == [(1, 2), (1, 2)]


def copied(group: Group) -> bool:
    holder = {"group": group, "weight": torch.zeros(1)}
    with pytest.raises(TypeError, match="a Group belongs to a running process and cannot be pickled"):
        pickle.dumps(holder)
    return copy.deepcopy(holder)["group"] is group


@pytest.mark.ranks(1, 2, gloo=2)
def test_copying_and_pickling(ranks: Ranks) -> None:
    assert ranks(copied) == [True] * ranks.world_size


@pytest.mark.parametrize("group", [Group.single(), Group.single(4)], ids=repr)
def test_copying_and_pickling_a_world_of_one(group: Group) -> None:
    assert copy.deepcopy([group])[0] is group
    assert facts(pickle.loads(pickle.dumps(group))) == facts(group)


@pytest.mark.parametrize("num_shards, dim, shape", [(4, 0, (4, 6)), (4, 1, (2, 12)), (2, -1, (3, 4)), (1, 0, (3, 3))])
def test_split_gives_one_view_per_logical_shard(num_shards: int, dim: int, shape: tuple[int, int]) -> None:
    group, each = Group.single(num_shards), shape[dim] // num_shards
    part = torch.arange(float(shape[0] * shape[1])).view(shape)
    pieces = group.split(part, dim)
    assert len(pieces) == len(group.shards)
    for j, piece in enumerate(pieces):
        assert torch.equal(piece, part.narrow(dim, j * each, each))
        assert piece.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()


def test_split_of_a_size_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="size 5 of dim 0 cannot be split into 4 logical shards"):
        Group.single(4).split(torch.zeros(5))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_STEP_NUM_TASKS"
    for name in (*names.split(), "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_init_without_environment(environment: pytest.MonkeyPatch) -> None:
    assert facts(init()) == (0, 1, 1, "backend")
    assert facts(init(num_shards=4)) == (0, 1, 4, "tree")
    environment.setenv("WORLD_SIZE", "1")
    assert facts(init()) == (0, 1, 1, "backend")
    assert not dist.is_initialized()
    close()


@pytest.mark.parametrize(
    "settings, message",
    [
        ("WORLD_SIZE=4", "WORLD_SIZE=4 but RANK is not set; start the program with torchrun"),
        ("RANK=1", "RANK=1 is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start the program with torchrun, or"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=29500", "RANK=0 is set, but not MASTER_ADDR; start the program with"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", r"RANK=2 is outside \[0, world_size=2\)"),
        ("RANK=one WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK='one' in the environment is no integer"),
        ("SLURM_STEP_NUM_TASKS=4", "srun started 4 tasks, but RANK is not set and each would run on its own; start"),
        ("OMPI_COMM_WORLD_SIZE=2", "mpirun started 2 tasks, but RANK is not set"),
    ],
)
def test_init_in_an_environment_with_holes(environment: pytest.MonkeyPatch, settings: str, message: str) -> None:
    for setting in settings.split():
        environment.setenv(*setting.split("="))
    with pytest.raises(ValueError, match=message):
        init()
    assert not dist.is_initialized()


def test_init_says_where_it_is_and_that_gpus_do_not_suffice(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (settings | {"LOCAL_WORLD_SIZE": "3", "TORCHELASTIC_RESTART_COUNT": "2"}).items():
        environment.setenv(name, value)
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    with caplog.at_level("INFO", "isoshard"):
        init()
        close()
    place, warning = caplog.messages
    assert re.fullmatch(r"1 ranks over gloo; this one on cpu, process \d+ of \S+, restart 2", place)
    assert warning == "3 ranks on this machine, which shows 2 GPU(s): they use the CPU"


def test_init_refuses_an_unknown_reduce_order_in_a_world_of_one(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='reduce_order=\'ring\' is not "backend" or "tree"'):
        init(reduce_order="ring")  # type: ignore[arg-type]


def test_init_and_close_under_torchrun(environment: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in settings.items():
        environment.setenv(name, value)
    group = init(device="cpu", num_shards=2)
    try:
        assert dist.get_backend() == "gloo" and group.pg is dist.group.WORLD
        assert facts(group) == facts(init(num_shards=2)) == (0, 1, 2, "tree")
    finally:
        close()
    assert not dist.is_initialized()


def whole_program(group: Group) -> tuple[Facts, float]:
    same = init()
    result = facts(same), total(same)
    assert same.pg is group.pg
    close()
    return result


def test_init_and_close_inside_a_simulation() -> None:
    assert simulate(whole_program, 2) == [((rank, 2, 2, "backend"), 1.0) for rank in range(2)]
    assert not dist.is_initialized()


def test_local_device(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device() == torch.device("cpu") == local_device("cpu")
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 4)
    assert local_device() == torch.device("cuda", 0)
    environment.setenv("LOCAL_RANK", "3")
    assert local_device() == local_device("cuda") == torch.device("cuda", 3)
    assert local_device("cuda:1") == torch.device("cuda", 1)
    assert local_device("cpu") == torch.device("cpu")
    environment.setenv("LOCAL_WORLD_SIZE", "5")
    assert local_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda: 5 ranks on this machine need as many GPUs, found 4"):
        local_device("cuda")
    with pytest.raises(ValueError, match="device='abacus' is none that torch knows"):
        local_device("abacus")
