"""What is global to the process but belongs to one rank while it runs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RankState:
    """Random states of torch, numpy and python, and the default dtype."""

    def __init__(self) -> None:
        self.save()

    def save(self) -> None:
        """Note the current state of the process."""
        self._torch = torch.get_rng_state()
        self._numpy: Any = np.random.get_state()
        self._python = random.getstate()
        self._dtype = torch.get_default_dtype()

    def restore(self) -> None:
        """Make this the current state of the process."""
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        torch.set_default_dtype(self._dtype)
