"""Raw collectives and the region functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from src import Group, SimulationError, simulate
from src.distributed import (
    all_gather,
    all_reduce,
    broadcast,
    copy_to_region,
    copy_to_shards,
    gather_from_region,
    join_shards,
    reduce_from_region,
    reduce_from_shards,
    reduce_scatter,
    scatter_to_region,
    split_shards,
)
from src.testing import Ranks

Collective = Callable[..., Tensor]
Want = Callable[[list[Tensor], int], Tensor]


def parts_of(world_size: int, shape: tuple[int, ...] = (8, 3, 16)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(world_size)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "every other": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


def call(group: Group, collective: Collective, options: dict[str, Any], layout: str) -> tuple[Tensor, bool, bool]:
    """The result, whether the input was left alone, and whether the result has memory of its own."""
    x = LAYOUTS[layout](parts_of(group.world_size)[group.rank])
    before = x.clone()
    out = collective(x, group=group, **options)
    own = out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    return out, torch.equal(x, before), own


def broadcast_from_last(x: Tensor, group: Group) -> Tensor:
    return broadcast(x, group=group, src=group.world_size - 1)


def joined(dim: int) -> Want:
    return lambda parts, rank: torch.cat(parts, dim)


def slice_of_sum(dim: int) -> Want:
    return lambda parts, rank: torch.stack(parts).sum(0).chunk(len(parts), dim)[rank]


CASES: dict[str, tuple[Collective, dict[str, Any], Want]] = {
    "all_reduce": (all_reduce, {}, lambda parts, rank: torch.stack(parts).sum(0)),
    "all_reduce max": (all_reduce, {"op": dist.ReduceOp.MAX}, lambda parts, rank: torch.stack(parts).amax(0)),
    "broadcast": (broadcast, {}, lambda parts, rank: parts[0]),
    "broadcast from last": (broadcast_from_last, {}, lambda parts, rank: parts[-1]),
    **{f"all_gather {d}": (all_gather, {"dim": d}, joined(d)) for d in (0, 1, 2, -1, -3)},
    **{f"reduce_scatter {d}": (reduce_scatter, {"dim": d}, slice_of_sum(d)) for d in (0, 2, -1, -3)},
}


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduce_order", ["backend", "tree"])
@pytest.mark.parametrize("case", CASES)
def test_raw_collective(ranks: Ranks, case: str, reduce_order: str, layout: str) -> None:
    collective, options, want = CASES[case]
    results = ranks(call, collective, options, layout, reduce_order=reduce_order)
    for rank, (out, untouched, own) in enumerate(results):
        assert untouched and (own or ranks.world_size == 1)
        torch.testing.assert_close(out, want(parts_of(ranks.world_size), rank), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("reduce_order", ["backend", "tree"])
@pytest.mark.parametrize("collective", [all_reduce, all_gather, reduce_scatter, broadcast])
def test_no_rank_sees_the_memory_of_another(collective: Collective, reduce_order: Any) -> None:
    inputs = parts_of(4)
    outputs = simulate(lambda g: collective(inputs[g.rank], group=g), 4, reduce_order=reduce_order)
    memory = {tensor.untyped_storage().data_ptr() for tensor in [*inputs, *outputs]}
    assert len(memory) == 8


def scatter_and_slice(group: Group) -> tuple[Tensor, Tensor]:
    x = parts_of(group.world_size)[group.rank].float()
    return reduce_scatter(x, group=group), all_reduce(x, group=group).chunk(group.world_size)[group.rank]


@pytest.mark.parametrize("reduce_order", ["backend", "tree"])
def test_reduce_scatter_is_all_reduce_and_slice(ranks: Ranks, reduce_order: str) -> None:
    for place in [("simulated", 4), ("gloo", 4)]:
        for scattered, sliced in ranks.on(*place)(scatter_and_slice, reduce_order=reduce_order):
            assert torch.equal(scattered, sliced), place


@pytest.mark.parametrize("dim, size", [(1, 6), (-1, 5)])
def test_slices_that_do_not_divide(dim: int, size: int) -> None:
    x = torch.zeros(4, size)
    for function, name in [(reduce_scatter, "reduce_scatter"), (scatter_to_region, "scatter_to_region")]:
        message = f"{name}: size {size} of dim {dim} is not divisible by world_size=4"
        with pytest.raises(SimulationError, match=message) as error:
            simulate(lambda g, f=function: f(x, group=g, dim=dim), 4)
        assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize("src", [2, -1])
def test_broadcast_from_a_rank_that_is_not_there(src: int) -> None:
    with pytest.raises(SimulationError, match=f"src={src}.*world_size=2") as error:
        simulate(lambda g: broadcast(torch.zeros(1), group=g, src=src), 2)
    assert isinstance(error.value.__cause__, ValueError)


REGIONS: dict[str, tuple[Collective, dict[str, int]]] = {
    "copy": (copy_to_region, {}),
    "reduce": (reduce_from_region, {}),
    "scatter": (scatter_to_region, {}),
    "scatter 0": (scatter_to_region, {"dim": 0}),
    "gather": (gather_from_region, {}),
    "gather 1": (gather_from_region, {"dim": 1}),
}


def upstream(shape: torch.Size, rank: int) -> Tensor:
    """A gradient that differs at every position and between ranks."""
    return torch.linspace(1, 2, shape.numel(), dtype=torch.float64).view(shape) * (rank + 1)


def through_regions(group: Group) -> dict[str, tuple[Tensor, Tensor]]:
    """Value and gradient of each; after a copy or scatter ranks go different ways, after the others the same."""
    *own, replicated = parts_of(group.world_size + 1)
    out = {}
    for name, (function, options) in REGIONS.items():
        splits = function in (copy_to_region, scatter_to_region)
        x = (replicated if splits else own[group.rank]).clone().requires_grad_()
        y = function(x, group=group, **options)
        y.backward(upstream(y.shape, group.rank if splits else 0))
        out[name] = y.detach(), x.grad
    return out


@pytest.mark.ranks(1, 2, 4, gloo=2)
def test_region_functions(ranks: Ranks) -> None:
    n = ranks.world_size
    *own, x = parts_of(n + 1)
    wide, tall = torch.cat(own, -1), torch.cat(own, 1)
    for rank, got in enumerate(ranks(through_regions)):
        columns, rows = x.chunk(n, -1)[rank], x.chunk(n, 0)[rank]
        want = {
            "copy": (x, torch.stack([upstream(x.shape, r) for r in range(n)]).sum(0)),
            "reduce": (torch.stack(own).sum(0), upstream(x.shape, 0)),
            "scatter": (columns, torch.cat([upstream(columns.shape, r) for r in range(n)], -1)),
            "scatter 0": (rows, torch.cat([upstream(rows.shape, r) for r in range(n)], 0)),
            "gather": (wide, upstream(wide.shape, 0).chunk(n, -1)[rank]),
            "gather 1": (tall, upstream(tall.shape, 0).chunk(n, 1)[rank]),
        }
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def over_shards(group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``y = sum_j sin(w_j * x)`` with one ``w_j`` per logical shard."""
    x, *weights = (part.to(dtype) for part in parts_of(group.num_shards + 1))
    mine = [weights[j].requires_grad_() for j in group.shards]
    copies = copy_to_shards(x.requires_grad_(), group=group)
    y = reduce_from_shards([torch.sin(w * c) for w, c in zip(mine, copies, strict=True)], group=group)
    y.backward(torch.ones_like(y))
    return y.detach(), x.grad, torch.stack([w.grad for w in mine])


@pytest.mark.ranks(1, 2, 4, 8, gloo=(2, 4))
def test_sums_over_logical_shards(ranks: Ranks) -> None:
    x, *weights = parts_of(9)
    y = sum(torch.sin(w * x) for w in weights)
    grad = sum(w * torch.cos(w * x) for w in weights)
    got = ranks(over_shards, torch.float64, num_shards=8)
    for got_y, got_grad, _ in got:
        torch.testing.assert_close(got_y, y, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(got_grad, grad, rtol=1e-13, atol=1e-13)
    weight_grads, want = torch.cat([result[2] for result in got]), torch.stack([x * torch.cos(w * x) for w in weights])
    torch.testing.assert_close(weight_grads, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_logical_shards_have_one_order(ranks: Ranks, dtype: torch.dtype) -> None:
    x, *weights = (part.to(dtype) for part in parts_of(9))
    a, b, c, d, e, f, g, h = (torch.sin(w * x) for w in weights)
    y = ((a + b) + (c + d)) + ((e + f) + (g + h))
    a, b, c, d, e, f, g, h = (w * torch.cos(w * x) for w in weights)
    grad = ((a + b) + (c + d)) + ((e + f) + (g + h))
    for place in [("simulated", n) for n in (1, 2, 4, 8)] + [("gloo", 2), ("gloo", 4)]:
        for got_y, got_grad, _ in ranks.on(*place)(over_shards, dtype, num_shards=8):
            assert torch.equal(got_y, y) and torch.equal(got_grad, grad), place


def test_a_shard_that_is_not_used_adds_nothing_to_the_gradient() -> None:
    def program(group: Group) -> Tensor:
        x = torch.ones(3, requires_grad=True)
        first, _ = copy_to_shards(x, group=group)
        (first * (group.rank + 1)).sum().backward()
        return x.grad

    assert [grad.tolist() for grad in simulate(program, 2, num_shards=4)] == [[3.0] * 3] * 2


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_split_shards_and_join_shards(dim: int) -> None:
    group, x = Group.single(4), torch.randn(4, 12, requires_grad=True)
    shards = split_shards(x, group=group, dim=dim)
    for shard, want in zip(shards, x.chunk(4, dim), strict=True):
        assert torch.equal(shard, want) and shard.is_contiguous() and shard.data_ptr() % 64 == 0
        shard.retain_grad()
    joined = join_shards(shards, dim=dim)
    assert torch.equal(joined, x)
    gradient = torch.randn(4, 12)
    joined.backward(gradient)
    assert torch.equal(x.grad, gradient)
    assert all(shard.grad.is_contiguous() for shard in shards)


@pytest.mark.parametrize("function", [copy_to_region, reduce_from_region, scatter_to_region, gather_from_region])
def test_second_derivatives_are_refused(function: Collective) -> None:
    def program(group: Group) -> None:
        x = torch.ones(4, 4, requires_grad=True)
        y = function(x, group=group).pow(2).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        first.sum().backward()

    with pytest.raises(SimulationError, match="differentiate twice"):
        simulate(program, 2)
