"""This rank's part of each parameter, as an index into the whole tensor of a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import Group
from ..modeling import ModelArgs, Transformer
from ..modeling.parameters import placements


@dataclass(frozen=True)
class LocalSlice:
    """Parameter ``name`` holds ``index`` of a tensor of ``shape``; what it holds beyond is padding."""

    name: str
    parameter: Tensor
    dim: int
    shape: tuple[int, ...]
    index: tuple[slice, ...]

    @property
    def length(self) -> int:
        """How far the slice reaches along ``dim``."""
        own = self.index[self.dim]
        return int(own.stop - own.start)

    def fill(self, value: Tensor) -> None:
        """Copy ``value`` into the parameter, in its dtype."""
        with torch.no_grad():
            self.parameter.narrow(self.dim, 0, self.length).copy_(value)

    def clear_padding(self) -> None:
        """Zeros where the parameter reaches beyond the whole tensor."""
        with torch.no_grad():
            self.parameter.narrow(self.dim, self.length, self.parameter.shape[self.dim] - self.length).zero_()


def local_slices(model: Transformer, group: Group) -> Iterator[LocalSlice]:
    """One for each parameter of ``model``, in its order, tied ones once."""
    for place in placements(model, group=group):
        dim = place.dim or 0
        shape, local = list(place.parameter.shape), place.parameter.shape[dim]
        whole = local if place.dim is None else place.size
        start = min(place.offset(group), whole)
        index = [slice(0, size) for size in shape]
        index[dim], shape[dim] = slice(start, min(start + local, whole)), whole
        yield LocalSlice(place.name, place.parameter, dim, tuple(shape), tuple(index))


def empty_model(args: ModelArgs, group: Group, dtype: torch.dtype, device: str | torch.device) -> Transformer:
    """A model whose parameters hold nothing yet, but padding: no time is spent on drawing what will be overwritten."""
    model = Transformer(args, group=group, dtype=dtype, device="meta").to_empty(device=device)
    model.tie_parameters()
    for item in local_slices(model, group):
        item.clear_padding()
    return model
