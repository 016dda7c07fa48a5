"""What all tests need: the plugin under test, one thread, and a look at what the process is left with."""

from __future__ import annotations

import pickle
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest_plugins = ["src.testing", "pytester"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits depend on the intra-op thread count; worker processes use one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
