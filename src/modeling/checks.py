"""Checks of what users pass in, shared by the modules."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(name: str, ids: Tensor, size: int, rank: int, *, sync: bool = False, ignore: int | None = None) -> None:
    """Raise unless every id lies in ``[0, size)`` or equals ``ignore``.

    TypeError for ids that are not int32 or int64; ValueError naming value, position and rank. On an accelerator the
    range is asserted on the device, without waiting for it, unless ``sync`` is set.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {ids.dtype}; convert them with .long()")
    bad = (ids < 0) | (ids >= size)
    if ignore is not None:
        bad &= ids != ignore
    if ids.is_meta:
        return
    if (ids.is_cuda and not sync) or torch.compiler.is_compiling():
        torch._assert_async(~bad.any(), f"{name} outside [0, {size})")
    elif bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: value {int(ids[position])} at position {position} on rank {rank} is outside [0, {size})"
        )


def check_activations(x: Tensor, size: int, what: str, sequence: bool = False) -> None:
    """Raise unless ``x`` is floating (TypeError) with a last dim of ``size`` and, with ``sequence``, [b, s, size]."""
    if not x.is_floating_point():
        raise TypeError(f"{what} expects floating-point activations, not {x.dtype}")
    if sequence and x.dim() != 3:
        raise ValueError(f"{what} expects [b, s, {size}], got a tensor of shape {list(x.shape)}")
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{what} expects a last dim of {size}, got a tensor of shape {list(x.shape)}")


def check_residual(x: Tensor, residual: Tensor | None, what: str) -> None:
    """Raise ValueError unless ``residual``, where there is one, has the shape of ``x``: nothing is broadcast."""
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{what} expects a residual of shape {list(x.shape)}, like x, got {list(residual.shape)}")
