"""Memory of large CPU tensors, which torch has the system hand out 4 KiB at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

HUGE_BYTES = 2**22
"""From this size on numpy asks the system for huge pages, where torch takes a page fault for every 4 KiB."""


def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like``, contiguous, and cheap to fill where it is large."""
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    if plain and x.is_cpu and not torch.compiler.is_compiling():
        return empty(x.shape, x.dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU, cheap to fill where it is large."""
    if shape.numel() * dtype.itemsize >= HUGE_BYTES:
        return _allocated(np.empty, shape, dtype)
    return torch.empty(shape, dtype=dtype, device="cpu")


def zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros; where there are many, the system provides the pages that are written: few rows of a table are."""
    if shape.numel() * dtype.itemsize >= HUGE_BYTES:
        return _allocated(np.zeros, shape, dtype)
    return torch.zeros(shape, dtype=dtype)


def _allocated(make: Callable[..., np.ndarray[Any, Any]], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor over an array of numpy's, aligned as torch's own are."""
    size = shape.numel() * dtype.itemsize
    array = make(size + 64, np.uint8)
    start = -array.ctypes.data % 64
    # Not by views of it: as the result of an autograd.Function they could not be modified in place.
    storage = torch.from_numpy(array).untyped_storage()
    strides = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, shape, strides)
