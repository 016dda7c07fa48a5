"""The places where one test body runs: simulated ranks, gloo processes, and GPUs where there are any."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def places(simulated: tuple[int, ...] = (1, 2, 4), gloo: tuple[int, ...] = (2,)) -> Any:
    """Parametrise a test with ``place = (backend, world_size)``."""
    found = [pytest.param(("simulated", n), id=f"simulated-{n}") for n in simulated]
    found += [pytest.param(("gloo", n), id=f"gloo-{n}") for n in gloo]
    for n in gloo:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        skip = pytest.mark.skipif(gpus < n, reason=f"needs {n} GPUs, found {gpus}")
        found.append(pytest.param(("nccl", n), id=f"nccl-{n}", marks=skip))
    return pytest.mark.parametrize("place", found)
