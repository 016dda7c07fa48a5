"""Which kernel serves a call, or none: the reference body in ``functional`` does the work then."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import cpu_embedding, cpu_linear, cpu_norm, cpu_rope

Kernel: TypeAlias = Callable[..., Any]

DEVICES = ("cuda",)
"""Where Triton's kernels run."""

_TRITON = {
    "group_rms_norm": "norm",
    "add_group_rms_norm": "norm",
    "rotate": "rope",
    "swiglu": "swiglu",
    "shard_embedding": "embedding",
    "cross_entropy_statistics": "cross_entropy",
    "cross_entropy_losses": "cross_entropy",
    "cross_entropy_gradient": "cross_entropy",
}
_CPU = {
    "linear": cpu_linear,
    "linear_input_grad": cpu_linear,
    "linear_weight_grad": cpu_linear,
    "group_rms_norm": cpu_norm,
    "rotate": cpu_rope,
    "shard_embedding": cpu_embedding,
}


def lookup(op: str, *arguments: Any) -> Kernel | None:
    """The kernel of ``op`` for these arguments, the first of which is a tensor or a tuple of tensors; None without one.

    Triton's on a GPU, where it is installed; on a CPU those that are faster than the body for tensors of this size.
    There is none while torch.compile traces (it fuses the reference body), or a transform of ``torch.func`` or
    forward-mode AD is active, for tensor subclasses, and for dtypes and shapes that the kernel does not serve. The
    answer depends on nothing that differs between ranks. Gradients of kernels cannot be batched or taken again.
    """
    if torch.compiler.is_compiling():
        return None
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    home = _CPU.get(op) if first.is_cpu and "cpu" not in DEVICES else _triton(op, first.device.type)
    if home is None or not home.supports(*arguments):
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    device = first.device
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.device != device for tensor in _tensors(arguments)):
        return None
    kernel: Kernel = getattr(home, op)
    return kernel


def _triton(op: str, device_type: str) -> ModuleType | None:
    """Where the Triton kernel of ``op`` is."""
    return _imported(_TRITON[op]) if op in _TRITON and device_type in DEVICES and _has_triton() else None


@cache
def _imported(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def _tensors(arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
