"""Which kernel serves a call, or none: the reference body in ``functional`` does the work then."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Kernel: TypeAlias = Callable[..., Any]

DEVICES = ("cuda",)
_HOMES = {
    "group_rms_norm": "norm",
    "add_group_rms_norm": "norm",
    "rotate": "rope",
    "swiglu": "swiglu",
    "shard_embedding": "embedding",
    "cross_entropy_statistics": "cross_entropy",
    "cross_entropy_gradient": "cross_entropy",
}


def lookup(op: str, *arguments: Any) -> Kernel | None:
    """The kernel of ``op`` for these arguments, the first of which is a tensor or a tuple of tensors; None without one.

    There is none on a CPU, without Triton, while torch.compile traces (it fuses the reference body) or a transform of
    ``torch.func`` is active, for tensor subclasses, and for dtypes and shapes that the kernel does not serve. The
    answer depends on nothing that differs between ranks. Gradients of kernels cannot be differentiated again.
    """
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    device = first.device
    if device.type not in DEVICES or torch.compiler.is_compiling() or not _has_triton():
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.device != device for tensor in _tensors(arguments)):
        return None
    home = importlib.import_module(f".{_HOMES[op]}", __package__)
    kernel: Kernel = getattr(home, op)
    return kernel if home.supports(*arguments) else None


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
