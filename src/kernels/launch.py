"""What all kernels share: the dtypes they serve, and how they are launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Start ``kernel`` on the device of its first argument, a tensor; an empty grid starts nothing."""
    if all(grid):
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **settings)


def aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it, contiguous from a 16-byte boundary on.

    Triton deals the numbers of an unaligned tensor out to threads in another way, and so sums them in another order:
    the bits of a sum would depend on where a shard begins in memory.
    """
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number >= 1``.

    >>> power_of_two(96)
    128
    """
    return 1 << (number - 1).bit_length()


def warps(elements: int) -> int:
    """Warps for a tile: 16 elements a thread, two 128-bit loads of 16-bit numbers, up to 16 warps."""
    return min(16, max(1, elements // 512))
