"""Initial values from private generators: the global random state is never touched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SEED_STRIDE = 1024
"""Distance between the base seeds of two layers: ``MAX_SHARDS`` streams for a weight, then as many for a bias."""

Fill = Callable[[Tensor, torch.Generator], object]


def model_seed(seed: int) -> int:
    """A base seed for a whole model, far from that of neighbouring ``seed`` values.

    torch's CPU generator uses the low 32 bits of a seed only, so a stream per parameter is found by counting
    from here in steps of SEED_STRIDE, not by hashing names: hashes of 32 bits would collide.
    """
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:3], "big") * 8


def fill_shards(shards: Sequence[Tensor], seeds: Sequence[int], fill: Fill) -> None:
    """Fill each tensor of ``shards`` by ``fill(tensor, generator)``, the generator seeded with its entry of ``seeds``.

    A shard that is a strided view is drawn contiguously first: the numbers depend on shape and seed alone.
    Tensors on the meta device hold no numbers and are left alone.
    """
    for shard, seed in zip(shards, seeds, strict=True):
        if shard.is_meta:
            continue
        generator = torch.Generator(shard.device).manual_seed(seed)
        with torch.no_grad():
            drawn = torch.empty_like(shard, memory_format=torch.contiguous_format)
            fill(drawn, generator)
            shard.copy_(drawn)


def normal(mean: float, std: float) -> Fill:
    """Fill from a normal distribution, as ``nn.init.normal_`` draws it."""
    return lambda tensor, generator: torch.nn.init.normal_(tensor, mean, std, generator=generator)


def uniform(low: float, high: float) -> Fill:
    """Fill from a uniform distribution on ``[low, high)``, as ``nn.init.uniform_`` draws it."""
    return lambda tensor, generator: torch.nn.init.uniform_(tensor, low, high, generator=generator)
