"""From an ordinary module that every rank holds whole to this rank's slices of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.group import Group
from ..sharding import shared_range, valid_size


def take_parameters(layer: nn.Module, source: nn.Module, taken: dict[Tensor, nn.Parameter] | None = None) -> None:
    """Give ``layer``, which was built for the shape of ``source``, this rank's slices of the parameters of ``source``.

    Values, dtype, device and ``requires_grad`` are those of ``source``; the slices share no memory with it. What
    ``taken`` holds already becomes one parameter with it, so that a call for each of two tied modules ties the layers.

    Raises TypeError for parameters that are not plain tensors.
    """
    taken = {} if taken is None else taken
    for name, whole in source.named_parameters():
        if whole not in taken:
            taken[whole] = nn.Parameter(_own_slice(layer, name, whole), requires_grad=whole.requires_grad)
        setattr(layer, name, taken[whole])


def check_plain(source: nn.Module) -> None:
    """Raise TypeError unless all parameters of ``source`` are plain tensors."""
    for name, parameter in source.named_parameters():
        kind = type(parameter.detach())
        if kind is not Tensor:
            raise TypeError(f"{name} is a {kind.__name__}: convert plain modules, before they are wrapped or quantized")


def _own_slice(layer: Any, name: str, whole: nn.Parameter) -> Tensor:
    """This rank's slice of ``whole`` in new memory, padded with zeros to the length it has in ``layer``."""
    value = whole.detach()
    dim = layer.shard_dims().get(name)
    if dim is not None:
        group: Group = layer.group
        replicas = layer.shard_replicas().get(name, 1) if hasattr(layer, "shard_replicas") else 1
        pieces = shared_range(group.shards, replicas)
        length = getattr(layer, name).shape[dim]
        start = min(pieces.start * length // len(pieces), value.shape[dim])
        value = value.narrow(dim, start, valid_size(value.shape[dim] - start, 0, length))
        if missing := length - value.shape[dim]:
            return F.pad(value, (0, 0) * (value.dim() - 1 - dim) + (0, missing))
    return value.clone(memory_format=torch.contiguous_format)
