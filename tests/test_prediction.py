"""Estimates against numbers worked out by hand, and against the algorithms they must enclose."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from src import Group, Ledger, simulate
from src.distributed import all_gather, all_reduce, barrier, broadcast, reduce_scatter
from src.distributed.prediction import FORMULA, Estimate, Link, Transfer, estimate, human_seconds
from src.testing import Ranks

ONE = [Link(alpha=2.0, beta=0.5)]
TWO = [Link(alpha=1.0, beta=0.25, ranks=4), Link(alpha=8.0, beta=2.0)]


@pytest.mark.parametrize(
    "op, low, high",
    [
        # 3 messages along a tree, 7/8 of 64 bytes at 0.5; a ring makes 7 steps of 2 + 8 * 0.5 seconds.
        ("all_gather", 6 + 28, 7 * 6),
        ("reduce_scatter", 6 + 28, 7 * 6),
        ("all_reduce", 6 + 2 * 28, 14 * 6),
        ("broadcast", 6 + 28, 14 * 6),
    ],
)
def test_one_level(op: str, low: float, high: float) -> None:
    assert estimate([Transfer(op, 64)], ONE, 8) == Estimate(8, low, high)


def test_a_barrier_costs_messages_alone() -> None:
    assert estimate([Transfer("barrier", 0)], ONE, 8) == Estimate(8, 3 * 2, 14 * 2)


def test_two_levels() -> None:
    # Inside: 2 messages, 2 * 3/4 of 64 bytes at 0.25. Across: 2 messages of 8, 2 * 3/4 of 64 / 4 bytes at 2.
    # The ring: 30 steps of 8 + 64 / 16 * 2 seconds.
    assert estimate([Transfer("all_reduce", 64)], TWO, 16) == Estimate(16, 2 + 24 + 16 + 48, 30 * 16)
    # Four ranks never leave the node, two use half of it.
    assert estimate([Transfer("all_reduce", 64)], TWO, 4) == Estimate(4, 2 + 24, 6 * (1 + 16 * 0.25))
    assert estimate([Transfer("all_gather", 64)], TWO, 2) == Estimate(2, 1 + 8, 1 + 32 * 0.25)
    assert estimate([Transfer("all_reduce", 64)], TWO, 1) == Estimate(1, 0, 0)


def test_three_levels_and_sizes_that_are_no_power_of_two() -> None:
    links = [Link(1.0, 1.0, ranks=3), Link(2.0, 2.0, ranks=6), Link(4.0, 4.0)]
    # 3 ranks: 2 messages, 2/3 of 36; 2 nodes: 1 message, 1/2 of 12; 3 racks: 2 messages, 2/3 of 6.
    want = (2 + 24) + (2 + 6 * 2) + (8 + 4 * 4)
    assert estimate([Transfer("all_gather", 36)], links, 18) == Estimate(18, want, 17 * (4 + 2 * 4))


def test_an_all_reduce_that_gathers_takes_the_longer_of_both() -> None:
    assert estimate([Transfer("all_reduce", 64, gathers=True)], ONE, 8) == Estimate(8, 62, 7 * (2 + 64 * 0.5))
    assert estimate([Transfer("all_reduce", 1, gathers=True)], ONE, 8).high == 14 * (2 + 0.5 / 8)


@pytest.mark.parametrize("n", [2, 4, 8, 64, 512])
@pytest.mark.parametrize("size", [8, 10**4, 10**6, 10**9])
def test_the_range_encloses_the_algorithms(n: int, size: int) -> None:
    alpha, beta, steps = 5e-6, 1e-9 / 50, math.log2(n)
    got = estimate([Transfer("all_reduce", size)], [Link(alpha, beta)], n)
    ring = 2 * (n - 1) * alpha + 2 * (n - 1) / n * size * beta
    halving_and_doubling = 2 * steps * alpha + 2 * (n - 1) / n * size * beta
    doubling = steps * (alpha + size * beta)
    assert got.high == pytest.approx(ring, rel=1e-12)
    assert got.low * (1 - 1e-12) <= min(ring, halving_and_doubling, doubling)
    assert min(halving_and_doubling, doubling) <= got.high * (1 + 1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 24, 48])
@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier"])
def test_low_is_never_above_high(op: str, n: int) -> None:
    for size in (0, 1, 10**3, 10**9):
        for slow in (1.0, 30.0):
            links = [Link(2e-6, 1e-11, ranks=6), Link(2e-6 * slow, 1e-11 * slow)]
            got = estimate([Transfer(op, size)], links, n)
            assert 0 <= got.low <= got.high * (1 + 1e-12)


def whole_and_slices(group: Group) -> Any:
    x = torch.ones(64, dtype=torch.float32)
    with Ledger() as ledger:
        all_reduce(x, group=group)
        all_gather(x[: 64 // group.world_size], group=group)
        reduce_scatter(x, group=group)
        broadcast(x, group=group)
        barrier(group)
    return [r.transfer for r in ledger.records], ledger.predict(ONE, sizes=(8, 2)), ledger.predict(TWO)


@pytest.mark.ranks(2, 4, gloo=2)
def test_records_of_any_size_predict_the_same(ranks: Ranks) -> None:
    # Ring order. On 8 ranks: 256 bytes; low 6 + 224, 6 + 112 twice, 6 + 112, 6; a step of the ring takes 2 + 16.
    want = [Estimate(8, 5 * 6 + 224 + 3 * 112, 14 * 18 * 2 + 7 * 18 * 2 + 14 * 2)]
    want += [Estimate(2, 5 * 2 + 128 + 3 * 64, 2 * 66 * 2 + 66 * 2 + 2 * 2)]
    for transfers, one_level, default_sizes in ranks(whole_and_slices):
        ops = ["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
        assert transfers == [*(Transfer(op, 256) for op in ops), Transfer("barrier", 0)]
        assert one_level == want
        assert [estimate.world_size for estimate in default_sizes] == [8, 64, 512]


def test_gathering_is_read_off_the_wire() -> None:
    def program(group: Group) -> list[bool]:
        with Ledger() as ledger:
            for elements in (1, 24, 2**17):
                all_reduce(torch.ones(elements), group=group)
            all_gather(torch.ones(1), group=group)
        return [record.transfer.gathers for record in ledger.records]

    assert simulate(program, 4, reduce_order="tree")[0] == [True, True, False, False]
    assert simulate(program, 4)[0] == [False] * 4
    assert simulate(program, 2, reduce_order="tree")[0] == [False] * 4


def test_links_in_the_units_of_data_sheets() -> None:
    link = Link.of(microseconds=3.5, gigabytes_per_second=400, ranks=8)
    assert (link.alpha, link.ranks) == (3.5e-6, 8)
    assert link.beta == pytest.approx(2.5e-12, rel=1e-12)


def test_text() -> None:
    text = str(Estimate(64, 0.00125, 2.5))
    assert text == f"64 GPUs: 1.25 ms to 2.50 s of communication (estimate)\n{FORMULA}"
    assert "estimate" in FORMULA and "not a measurement" in FORMULA
    assert [human_seconds(s) for s in (0, 2.5e-7, 1e-3, 90)] == ["0.00 µs", "0.25 µs", "1.00 ms", "90.00 s"]


@pytest.mark.parametrize(
    "links, size, message",
    [
        ([Link(1, 1, ranks=8)], 16, "the links join 8 ranks, not world_size=16"),
        ([], 2, "the links join 1 ranks, not world_size=2"),
        ([Link(1, 1, ranks=8), Link(1, 1)], 12, "world_size=12 is not a multiple of the ranks=8 that a link joins"),
        (
            [Link(1, 1, ranks=4), Link(1, 1, ranks=6), Link(1, 1)],
            24,
            "a link of ranks=6 cannot join whole links of ranks=4",
        ),
        (
            [Link(1, 1, ranks=4), Link(1, 1, ranks=4), Link(1, 1)],
            8,
            "a link of ranks=4 cannot join whole links of ranks=4",
        ),
        ([Link(1, 1)], 0, "world_size=0 must be at least 1"),
    ],
)
def test_links_that_do_not_fit(links: list[Link], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate([Transfer("all_reduce", 8)], links, size)


def test_bad_values() -> None:
    with pytest.raises(ValueError, match=r"alpha=-1 and beta=1 must not be negative"):
        Link(-1, 1)
    with pytest.raises(ValueError, match=r"ranks=1: a link joins at least 2"):
        Link(1, 1, ranks=1)
    with pytest.raises(ValueError, match=r"gigabytes_per_second=0 must be positive"):
        Link.of(microseconds=1, gigabytes_per_second=0)
    with pytest.raises(ValueError, match=r"op='scatter' is none of all_reduce, all_gather"):
        estimate([Transfer("scatter", 8)], ONE, 2)
