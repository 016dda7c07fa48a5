"""Where test bodies run: ``places()`` parametrises a test, ``on_ranks`` runs a program there."""

from __future__ import annotations

import pickle
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

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


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """Ends a test whose ranks wait for ever: the error reaches ``simulate`` like Ctrl-C does."""

    def stop(*_: Any) -> None:
        raise TimeoutError("simulated ranks hang")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def process_state() -> dict[str, Any]:
    return {
        "random": pickle.dumps((torch.get_rng_state().numpy(), np.random.get_state(), random.getstate())),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "hook": sys.excepthook,
        "default group": dist.is_initialized(),
        "ranks alive": [t.name for t in threading.enumerate() if t.name.startswith("simulated rank")],
    }


@pytest.fixture
def left_as_found() -> Iterator[None]:
    """A test that asks for this must leave the process as it was, whatever went wrong inside."""
    before = process_state()
    yield
    assert process_state() == before


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
