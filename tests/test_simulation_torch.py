"""What torch.distributed offers, on simulated ranks; and their bits beside gloo's."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from src import Group, simulate
from src.distributed import all_reduce
from src.testing import Ranks

Program = Callable[[Group], Any]


pytestmark = pytest.mark.usefixtures("left_as_found")


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


def test_polling_lets_the_others_run() -> None:
    def program(group: Group) -> tuple[float, int]:
        x, polls = torch.ones(1), 0
        work = dist.all_reduce(x, async_op=True)
        while not work.is_completed():
            polls += 1
        return x.item(), polls

    assert simulate(program, 3) == [(3.0, 0)] * 3


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


FAKE_TENSORS_INSIDE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from src import simulate

def program(group):
    with FakeTensorMode():
        return list((torch.empty(3) + group.rank).shape)

print([simulate(program, 4) for _ in range(5)] == [[[3]] * 4] * 5)
"""


def test_fake_tensors_in_one_simulation_after_the_other() -> None:
    """A process of its own: torch built for CUDA crashes without a GPU when nobody looks after it."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", FAKE_TENSORS_INSIDE], cwd=root, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


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
OLD = torch.__version__ < torch.torch_version.TorchVersion("2.12")
OPERATIONS = [
    gather,
    scatter,
    reduce,
    *REDUCE_OPS,
    reduce_scatter,
    reduce_scatter_flat,
    pytest.param(all_to_all, marks=pytest.mark.skipif(OLD, reason="gloo of torch 2.11 has no all_to_all of lists")),
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
def test_same_bits_as_gloo(ranks: Ranks, operation: Any) -> None:
    real, simulated = (ranks.on(kind, 4)(operate, operation) for kind in ("gloo", "simulated"))
    torch.testing.assert_close(simulated, real, rtol=0, atol=0)
