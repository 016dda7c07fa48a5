"""What is global to the process but belongs to one rank while it runs."""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand

_MT19937_BYTES = 624 * 4 + 4
"""The key of numpy's default generator, and the position in it."""


class RankState:
    """Random states of torch, numpy and python, and the default dtype."""

    def __init__(self) -> None:
        self._numpy = NumpyState()
        self.save()

    def save(self) -> None:
        """Note the current state of the process."""
        self._torch = torch.get_rng_state()
        self._numpy.save()
        self._python = random.getstate()
        self._dtype = torch.get_default_dtype()

    def restore(self, previous: RankState | None = None) -> None:
        """Make this the current state of the process, which is ``previous``, if anything is known of it."""
        torch.set_rng_state(self._torch)
        self._numpy.restore(None if previous is None else previous._numpy)
        random.setstate(self._python)
        torch.set_default_dtype(self._dtype)


class NumpyState:
    """The state of ``np.random``.

    ``np.random.get_state`` and ``set_state`` take 30 microseconds each, so the generator's memory is copied instead.
    Only where a second normal number is held back, which lies elsewhere, do those two do the work.
    """

    def __init__(self) -> None:
        self._memory = b""
        self._whole: Any = None

    def save(self) -> None:
        memory = _memory()
        if not memory or memory != self._memory or self._holds_a_number:
            self._memory, self._whole = memory, np.random.get_state()

    def restore(self, previous: NumpyState | None) -> None:
        known = previous is not None and previous._memory and not previous._holds_a_number
        if known and self._memory and not self._holds_a_number:
            ctypes.memmove(_address(), self._memory, _MT19937_BYTES)
        else:
            np.random.set_state(self._whole)

    @property
    def _holds_a_number(self) -> bool:
        return self._whole is None or bool(self._whole[3])


def _memory() -> bytes:
    """Nothing for a generator of another kind."""
    is_default = isinstance(mtrand.get_bit_generator(), np.random.MT19937)
    return ctypes.string_at(_address(), _MT19937_BYTES) if is_default else b""


def _address() -> int:
    return int(mtrand.get_bit_generator().ctypes.state_address)
