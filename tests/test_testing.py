"""RankPool: worker processes that run programs, and what it says when they fail."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from src import Group
from src.testing import RankPool

from .conftest import OnRanks


@pytest.fixture
def one() -> Iterator[RankPool]:
    pool = RankPool("gloo", 1, timeout=60)
    yield pool
    pool.close()


def facts(group: Group, scale: int) -> dict[str, Any]:
    numbers = torch.tensor([float(scale * group.rank)])
    dist.all_reduce(numbers)
    return {
        "who": (group.rank, group.world_size, group.num_shards, group.reduce_order, torch.get_num_threads()),
        "sum": numbers,
        "process": os.getpid(),
    }


def test_results_come_in_rank_order_from_processes_that_stay(on_ranks: OnRanks) -> None:
    first, second = (on_ranks(("gloo", 2), facts, scale, num_shards=4) for scale in (10, 20))
    assert [result["who"] for result in first] == [(0, 2, 4, "tree", 1), (1, 2, 4, "tree", 1)]
    assert [result["sum"].item() for result in first + second] == [10.0, 10.0, 20.0, 20.0]
    processes = [result["process"] for result in first]
    assert processes == [result["process"] for result in second]
    assert len({*processes, os.getpid()}) == 3


def process(group: Group) -> int:
    return os.getpid()


def fail_on_one(group: Group, number: int) -> None:
    if group.rank == 1:
        raise LookupError(f"number {number}")
    dist.barrier()


def sleep_on_one(group: Group) -> None:
    time.sleep(60 * group.rank)


def test_failures_name_the_rank_and_the_next_run_starts_anew() -> None:
    pool = RankPool("gloo", 2, timeout=60)
    try:
        with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed:.*in fail_on_one.*LookupError: number 17"):
            pool.run(fail_on_one, 17)
        processes = pool.run(process)
        assert processes == pool.run(process) and len(set(processes)) == 2
        pool.timeout = 0.5
        with pytest.raises(TimeoutError, match=r"ranks \[1\] did not answer within 0.5 s"):
            pool.run(sleep_on_one)
        assert not any(is_alive(process) for process in processes)
    finally:
        pool.close()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_that_do_not_even_start_are_named() -> None:
    pool = RankPool("gloo", 2, timeout=0.05)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not answer within 0.05 s"):
        pool.run(process)


def end_process(group: Group) -> None:
    os._exit(3)


def end_process_soon(group: Group) -> None:
    threading.Timer(0.1, os._exit, [3]).start()


def test_a_process_that_dies(one: RankPool) -> None:
    with pytest.raises(RuntimeError, match="rank 0 of 1 failed:\nits process ended with exit code 3"):
        one.run(end_process)


def test_a_process_that_dies_between_two_programs(one: RankPool) -> None:
    one.run(end_process_soon)
    time.sleep(0.3)
    with pytest.raises(RuntimeError, match="rank 0 of 1 failed:\nits process ended with exit code 3"):
        one.run(process)


def unpicklable(group: Group) -> Group:
    return group


def test_a_result_that_cannot_be_sent(one: RankPool) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 of 1 failed:.*a Group .* cannot be pickled"):
        one.run(unpicklable)
