"""The integer arithmetic of logical shards."""

from __future__ import annotations

import doctest
import re

import pytest

from src import sharding
from src.sharding import check_num_shards, check_rank, padded_size, shard_range, shard_size, valid_size

FITTING = [(1, 1), (3, 3), (6, 6), (8, 1), (8, 2), (8, 4), (8, 8), (64, 16)]


def test_docstrings() -> None:
    failed, tried = doctest.testmod(sharding)
    assert tried >= 3 and not failed


@pytest.mark.parametrize("num_shards, world_size", FITTING)
def test_ranks_hold_every_shard_once_and_in_order(num_shards: int, world_size: int) -> None:
    check_num_shards(num_shards, world_size)
    held = [list(shard_range(rank, world_size, num_shards)) for rank in range(world_size)]
    assert [shard for shards in held for shard in shards] == list(range(num_shards))
    assert {len(shards) for shards in held} == {num_shards // world_size}


@pytest.mark.parametrize(
    "num_shards, world_size, offered",
    [(0, 1, 1), (-2, 2, 2), (2, 4, 4), (7, 4, 8), (3, 1, 4), (12, 4, 16), (6, 3, 3)],
)
def test_num_shards_that_do_not_fit(num_shards: int, world_size: int, offered: int) -> None:
    message = f"num_shards={num_shards} must equal world_size={world_size}, .* pass num_shards={offered}$"
    with pytest.raises(ValueError, match=message):
        check_num_shards(num_shards, world_size)


@pytest.mark.parametrize("num_shards, world_size", [(0, 1), (2, 4), (5, 2), (9, 4), (17, 8), (4, 3)])
def test_the_num_shards_that_the_error_offers_fits(num_shards: int, world_size: int) -> None:
    with pytest.raises(ValueError) as error:
        check_num_shards(num_shards, world_size)
    offered = re.search(r"pass num_shards=(\d+)", str(error.value))
    assert offered
    check_num_shards(int(offered[1]), world_size)


@pytest.mark.parametrize("rank, world_size", [(0, 1), (3, 4)])
def test_rank_inside(rank: int, world_size: int) -> None:
    check_rank(rank, world_size)


@pytest.mark.parametrize(
    "rank, world_size, message",
    [
        (0, 0, "world_size=0 must be at least 1"),
        (4, 4, r"rank=4 is outside \[0, world_size=4\)"),
        (-1, 2, r"rank=-1 is outside \[0, world_size=2\)"),
    ],
)
def test_rank_outside(rank: int, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rank(rank, world_size)


@pytest.mark.parametrize(
    "size, num_shards, want", [(50257, 4, 50260), (50260, 4, 50260), (1, 8, 8), (0, 8, 0), (9, 8, 16)]
)
def test_padded_size(size: int, num_shards: int, want: int) -> None:
    assert padded_size(size, num_shards) == want


def test_shard_size() -> None:
    assert shard_size("hidden_size", 24, 8, 2) == 3
    assert shard_size("hidden_size", 24, 1, 1) == 24


@pytest.mark.parametrize(
    "num_shards, world_size, remedy, message",
    [
        (
            4,
            4,
            "pass pad_vocab=True to pad it to 50260",
            "vocab_size=50257 cannot be sharded over world_size=4 ranks; pass pad_vocab=True to pad it to 50260",
        ),
        (
            8,
            2,
            "",
            r"vocab_size=50257 cannot be sharded over num_shards=8 logical shards \(world_size=2 ranks\); "
            "choose vocab_size as a multiple of 8",
        ),
    ],
)
def test_a_size_that_does_not_divide(num_shards: int, world_size: int, remedy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shard_size("vocab_size", 50257, num_shards, world_size, remedy)


@pytest.mark.parametrize("size", [0, 1, 7, 10, 15, 16])
def test_valid_size_counts_each_real_element_once(size: int) -> None:
    length = 4
    want = [len([i for i in range(j * length, (j + 1) * length) if i < size]) for j in range(4)]
    assert [valid_size(size, j, length) for j in range(4)] == want
