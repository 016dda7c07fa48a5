"""What the layers say about their parameters, gathered for a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..distributed.group import Group


@dataclass(frozen=True)
class Placement:
    """Where a parameter of a model lies: ``dim`` is its sharded dim (None: replicated), ``size`` the real length of it.

    ``size`` counts no padding: a padded vocabulary has fewer rows than the ranks hold together.
    """

    name: str
    parameter: nn.Parameter
    dim: int | None
    size: int


def placements(model: nn.Module, *, group: Group) -> Iterator[Placement]:
    """Every parameter once, tied ones under their first name, in the model's order."""
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        dims = module.shard_dims() if hasattr(module, "shard_dims") else {}
        unpadded = module.unpadded_sizes() if hasattr(module, "unpadded_sizes") else {}
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            dim = dims.get(name)
            length = 0 if dim is None else parameter.shape[dim] * group.world_size
            yield Placement(f"{path}.{name}" if path else name, parameter, dim, unpadded.get(name, length))
