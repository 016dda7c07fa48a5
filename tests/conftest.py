"""Where test bodies run: ``places()`` parametrises a test, ``on_ranks`` runs a program there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from src import simulate
from src.testing import RankPool

OnRanks = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits depend on the intra-op thread count; worker processes use one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[tuple[str, int], RankPool]]:
    """The worker processes of this test run."""
    started: dict[tuple[str, int], RankPool] = {}
    yield started
    for pool in started.values():
        pool.close()


@pytest.fixture
def on_ranks(pools: dict[tuple[str, int], RankPool]) -> OnRanks:
    """``on_ranks(place, program, *args, **group_options)``: ``program(group, *args)`` on every rank of ``place``."""

    def run(place: tuple[str, int], program: Callable[..., Any], *args: Any, **group_options: Any) -> list[Any]:
        backend, world_size = place
        if backend == "simulated":
            return simulate(program, world_size, *args, **group_options)
        if place not in pools:
            pools[place] = RankPool(backend, world_size)
        return pools[place].run(program, *args, **group_options)

    return run
