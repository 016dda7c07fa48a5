"""What the kernels for CPUs share: work is done on blocks of rows that stay in cache."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**17
"""Elements of one block of rows."""


def row_blocks(x: Tensor, elements: int | None = None) -> list[slice]:
    """Runs of the first dim of ``x``, of about ``elements`` (``BLOCK_ELEMENTS``) elements each."""
    height = max(1, (elements or BLOCK_ELEMENTS) * len(x) // max(1, x.numel()))
    return [slice(i, i + height) for i in range(0, len(x), height)]


def wide(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 where that is wider: the type in which statistics are taken."""
    return torch.promote_types(dtype, torch.float32)


def learns(*tensors: Tensor) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
