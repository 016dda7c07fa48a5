"""The orders of summation: the fixed binary tree, and the ring of gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from src import Group
from src.distributed import all_reduce, collectives, reduction
from src.distributed.collectives import GATHER_BYTES
from src.distributed.reduction import ring_part, ring_sum, tree_sum
from src.testing import Ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [*range(1, 71), 1000, 2**16 + 3, 1_000_003]


def terms_of(number: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """One tensor per rank; far enough apart in size that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(size)
    return [(torch.randn(size, generator=generator) * 3 ** (rank % 4)).to(dtype) for rank in range(number)]


def test_tree_order_written_out() -> None:
    a, b, c, d, e, f, g, h = terms_of(8, 1000)
    assert torch.equal(tree_sum([a]), a)
    assert torch.equal(tree_sum([a, b]), a + b)
    assert torch.equal(tree_sum([a, b, c]), (a + b) + c)
    assert torch.equal(tree_sum([a, b, c, d]), (a + b) + (c + d))
    assert torch.equal(tree_sum([a, b, c, d, e]), ((a + b) + (c + d)) + e)
    assert torch.equal(tree_sum([a, b, c, d, e, f]), ((a + b) + (c + d)) + (e + f))
    assert torch.equal(tree_sum([a, b, c, d, e, f, g, h]), ((a + b) + (c + d)) + ((e + f) + (g + h)))
    assert not torch.equal(tree_sum([a, b, c, d]), ((a + b) + c) + d)


def test_tree_rounds_to_the_dtype_at_each_step() -> None:
    one, tiny = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 2.0**-9, dtype=torch.bfloat16)
    assert tree_sum([one, tiny, one, tiny]).item() == 2.0
    assert tree_sum([one, one, tiny, tiny]).item() == 2.0
    assert tree_sum([one, tiny, tiny, tiny]).item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_terms_first_and_then_across_ranks_is_the_same_tree(dtype: torch.dtype) -> None:
    terms = terms_of(16, 1000, dtype)
    for world_size in (1, 2, 4, 8, 16):
        each = 16 // world_size
        subtotals = [tree_sum(terms[rank * each : (rank + 1) * each]) for rank in range(world_size)]
        assert torch.equal(tree_sum(subtotals), tree_sum(terms)), world_size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [4, 5, 8])
def test_both_ways_of_taking_ring_sums_have_the_same_bits(
    number: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for limit in (0, 2**30):
        monkeypatch.setattr(reduction, "FEW_OPERATORS", limit)
        found.append([ring_sum(terms_of(number, size, dtype)) for size in SIZES[:-1]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_sums_leave_their_terms_alone() -> None:
    for add in (tree_sum, ring_sum):
        terms = terms_of(4, 50)
        add(terms)
        assert all(torch.equal(now, before) for now, before in zip(terms, terms_of(4, 50), strict=True))


def ring_order(terms: list[Tensor], block: int) -> Tensor:
    """Element ``i`` of block ``k`` added in the order ``k-1, k-2, …, k``."""
    out = []
    for i in range(terms[0].numel()):
        k = i // block
        total = terms[(k - 1) % len(terms)][i]
        for step in range(2, len(terms) + 1):
            total = total + terms[(k - step) % len(terms)][i]
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("world_size, size, block", [(2, 12, 6), (3, 12, 4), (4, 16, 4), (4, 64, 16)])
def test_ring_order_written_out(world_size: int, size: int, block: int) -> None:
    terms = terms_of(world_size, size)
    assert torch.equal(ring_sum(terms), ring_order(terms, block))


def test_ring_keeps_shapes() -> None:
    terms = [term.view(3, 4).t() for term in terms_of(3, 12)]
    total = sum(term.double() for term in terms)
    torch.testing.assert_close(ring_sum(terms).double(), total, rtol=1e-6, atol=1e-5)
    assert ring_sum([torch.zeros(0, 3)] * 2).shape == (0, 3)
    assert ring_sum([torch.tensor(1.5)] * 3).item() == 4.5


@pytest.mark.parametrize("world_size, size, cut", [(3, 100, 7), (4, 1000, 333), (4, 5, 2), (5, 64, 64)])
def test_parts_of_a_ring_sum(world_size: int, size: int, cut: int) -> None:
    terms = terms_of(world_size, size)
    parts = [ring_part([term[i : i + cut] for term in terms], i, size) for i in range(0, size, cut)]
    assert torch.equal(torch.cat(parts), ring_sum(terms))


def ring_differs_from_gloo(group: Group, dtype: torch.dtype) -> list[int]:
    """The sizes at which gloo's own all-reduce has other bits than ``ring_sum``."""
    wrong = []
    for size in SIZES:
        terms = terms_of(group.world_size, size, dtype)
        want = terms[group.rank].clone()
        dist.all_reduce(want, group=group.pg)
        if not torch.equal(ring_sum(terms), want):
            wrong.append(size)
    return wrong


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ring_has_the_bits_of_gloo(ranks: Ranks, world_size: int, dtype: torch.dtype) -> None:
    assert ranks.on("gloo", world_size)(ring_differs_from_gloo, dtype) == [[]] * world_size


def summed(group: Group, dtype: torch.dtype, sizes: list[int]) -> list[Tensor]:
    return [all_reduce(terms_of(group.world_size, size, dtype)[group.rank], group=group) for size in sizes]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64], ids=str)
def test_simulated_all_reduce_has_the_bits_of_gloo(ranks: Ranks, world_size: int, dtype: torch.dtype) -> None:
    sizes = [1, 5, 7, 33, 64, 1000, 2**16 + 3]
    real, simulated = (ranks.on(kind, world_size)(summed, dtype, sizes) for kind in ("gloo", "simulated"))
    for want, got in zip(real, simulated, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def sizes_around(dtype: torch.dtype) -> list[int]:
    limit = GATHER_BYTES // dtype.itemsize
    return [1, 3, limit - 1, limit, limit + 1, limit + 6, 3 * limit]


@pytest.mark.ranks(2, 3, 8, gloo=(2, 4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tree_all_reduce_is_the_tree_on_both_sides_of_the_limit(ranks: Ranks, dtype: torch.dtype) -> None:
    sizes = sizes_around(dtype)
    want = [tree_sum(terms_of(ranks.world_size, size, dtype)) for size in sizes]
    for got in ranks(summed, dtype, sizes, reduce_order="tree"):
        assert [torch.equal(a, b) for a, b in zip(got, want, strict=True)] == [True] * len(sizes)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 7, 2), (0, 4)])
def test_both_ways_of_the_tree_keep_shapes_and_bits(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    results = []
    for limit in (GATHER_BYTES, 0):
        monkeypatch.setattr(collectives, "GATHER_BYTES", limit)
        results.append(ranks.on("simulated", 4)(shaped, shape, reduce_order="tree"))
    for gathered, exchanged in zip(*results, strict=True):
        assert gathered.shape == shape
        assert torch.equal(gathered, exchanged) and torch.equal(gathered, results[0][0])


def shaped(group: Group, shape: tuple[int, ...]) -> Tensor:
    return all_reduce(torch.randn(shape, generator=torch.Generator().manual_seed(group.rank)), group=group)
