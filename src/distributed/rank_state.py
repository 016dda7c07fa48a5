"""What is global to the process but belongs to one rank while it runs."""

from __future__ import annotations

import ctypes
import functools
import random
import struct
import sys
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand

_RANDOM = random.Random.__mro__[1]
_MT19937_BYTES = 624 * 4 + 4
"""The key of numpy's default generator, and the position in it."""


class RankState:
    """Random states of torch, numpy and python, and the default dtype."""

    def __init__(self) -> None:
        self._numpy, self._python = NumpyState(), PythonState()
        self.save()

    def save(self) -> None:
        """Note the current state of the process."""
        self._torch = torch.get_rng_state()
        self._numpy.save()
        self._python.save()
        self._dtype = torch.get_default_dtype()

    def restore(self, previous: RankState | None = None) -> None:
        """Make this the current state of the process, which is ``previous``, if anything is known of it."""
        torch.set_rng_state(self._torch)
        self._numpy.restore(None if previous is None else previous._numpy)
        self._python.restore(None if previous is None else previous._python)
        if torch.get_default_dtype() != self._dtype:
            torch.set_default_dtype(self._dtype)


class PythonState:
    """The state of ``random``.

    ``random.getstate`` takes ten microseconds, so it is asked only when the generator's memory has changed.
    """

    def __init__(self) -> None:
        self._memory: tuple[bytes, float | None] = b"", None
        self._whole: Any = None

    def save(self) -> None:
        memory = _python_memory()
        if memory is None or memory != self._memory:
            self._whole = random.getstate()
            self._memory = memory or (b"", None)

    def restore(self, previous: PythonState | None) -> None:
        if previous is None or not self._memory[0] or previous._memory != self._memory:
            random.setstate(self._whole)


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
        if previous is None or not (known and self._memory and not self._holds_a_number):
            np.random.set_state(self._whole)
        elif previous._memory != self._memory:
            ctypes.memmove(_address(), self._memory, _MT19937_BYTES)

    @property
    def _holds_a_number(self) -> bool:
        return self._whole is None or bool(self._whole[3])


def _python_memory() -> tuple[bytes, float | None] | None:
    """The memory of python's generator, and the normal number that it holds back; None where it cannot be read."""
    generator: Any = _python_generator()
    if generator is None:
        return None
    begin, end = object.__basicsize__, _RANDOM.__basicsize__
    return ctypes.string_at(id(generator) + begin, end - begin), generator.gauss_next


@functools.cache
def _python_generator() -> random.Random | None:
    """The generator behind ``random.random``, if its key lies in the memory of the object itself."""
    generator: Any = random.random.__self__  # type: ignore[attr-defined]
    if sys.implementation.name != "cpython":
        return None
    key = struct.pack("624I", *generator.getstate()[1][:624])
    return generator if key in ctypes.string_at(id(generator), _RANDOM.__basicsize__) else None


def _memory() -> bytes:
    """Nothing for a generator of another kind."""
    is_default = isinstance(mtrand.get_bit_generator(), np.random.MT19937)
    return ctypes.string_at(_address(), _MT19937_BYTES) if is_default else b""


def _address() -> int:
    return int(mtrand.get_bit_generator().ctypes.state_address)
