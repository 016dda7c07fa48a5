"""The fixture ``ranks``, and the time limit of simulated ranks."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from src import Group, SimulationError
from src.rank_runs import time_limit
from src.testing import RankFailed, Ranks


def test_an_alarm_that_is_set_already_stays() -> None:
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    with pytest.raises(TimeoutError, match=r"0.01 s\nno rank runs"), time_limit(0.01, "nothing"):
        time.sleep(1)
    signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        with time_limit(0.01, "nothing"):
            time.sleep(0.05)
        assert 40 < signal.getitimer(signal.ITIMER_REAL)[0] < 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def who(group: Group, scale: int = 1) -> tuple[int, int, int, str]:
    return group.rank * scale, group.world_size, group.num_shards, group.reduce_order


@pytest.mark.ranks(2, 4, gloo=2, num_shards=4)
def test_the_fixture_runs_programs(ranks: Ranks) -> None:
    n = ranks.world_size
    assert ranks(who, 10) == [(rank * 10, n, 4, "tree") for rank in range(n)]
    assert ranks(who, num_shards=8) == [(rank, n, 8, "tree") for rank in range(n)]
    assert ranks.on("simulated", 1)(who) == [(0, 1, 4, "tree")]
    assert ranks.backend in ("simulated", "gloo")


def fail_everywhere(group: Group, number: int) -> None:
    time.sleep(0.1 if group.rank == 0 else 0)
    raise LookupError(f"number {number + group.rank}")


def files(caught: pytest.ExceptionInfo[BaseException]) -> set[str]:
    return {Path(entry.path).name for entry in caught.traceback}


@pytest.mark.parametrize("backend", ["simulated", "gloo"])
def test_the_lowest_rank_that_fails_is_shown(ranks: Ranks, backend: str) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 0 of 2 .*fail_everywhere.*LookupError: number 17") as caught:
        ranks.on(backend, 2)(fail_everywhere, 17)
    assert (caught.value.rank, caught.value.world_size, caught.value.backend) == (0, 2, backend)
    assert files(caught) == {"test_rank_runs.py", "rank_runs.py"}


def test_what_the_fixture_refuses(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match=r"needs @pytest.mark.ranks\(...\) on the test, or ranks.on"):
        ranks(who)
    with pytest.raises(ValueError, match="backend='gluo' must be one of simulated, gloo, nccl"):
        ranks.on("gluo", 2)
    with pytest.raises(TypeError, match=r"cannot be sent to gloo processes: .*<lambda>"):
        ranks.on("gloo", 2)(lambda group: None)
    with pytest.raises(SimulationError, match="deadlock") as caught:
        ranks.on("simulated", 2)(lambda group: group.rank or dist.barrier())
    assert files(caught) == {"test_rank_runs.py", "rank_runs.py"}
