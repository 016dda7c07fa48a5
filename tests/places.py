"""The places where one test body runs: simulated ranks and gloo processes. GPUs: test_cuda.py."""

from __future__ import annotations

from typing import Any

import pytest


def places(simulated: tuple[int, ...] = (1, 2, 4), gloo: tuple[int, ...] = (2,)) -> Any:
    """Parametrise a test with ``place = (backend, world_size)``."""
    found = [pytest.param(("simulated", n), id=f"simulated-{n}") for n in simulated]
    found += [pytest.param(("gloo", n), id=f"gloo-{n}") for n in gloo]
    return pytest.mark.parametrize("place", found)
