"""Which rank holds which logical shard: integers only.

A parameter is cut along one dim into ``num_shards`` (V) equal logical shards. Rank ``r`` of ``w`` holds the
consecutive shards ``[r * V / w, (r + 1) * V / w)``. V decides the bits, w only who computes them.
"""

from __future__ import annotations


def check_num_shards(num_shards: int, world_size: int) -> None:
    """Raise ValueError unless ``num_shards`` logical shards can live on ``world_size`` ranks."""
    if num_shards < 1 or num_shards % world_size:
        raise ValueError(
            f"num_shards={num_shards} must be a positive multiple of world_size={world_size}; "
            f"pass num_shards={max(1, -(-num_shards // world_size)) * world_size} or run on fewer ranks"
        )
    if num_shards > world_size and num_shards & (num_shards - 1):
        raise ValueError(
            f"num_shards={num_shards} must be a power of two when it exceeds world_size={world_size}, "
            "so that local and cross-rank sums form one binary tree; pass the next power of two"
        )


def check_rank(rank: int, world_size: int) -> None:
    """Raise ValueError unless ``0 <= rank < world_size``."""
    if world_size < 1:
        raise ValueError(f"world_size={world_size} must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is outside [0, world_size={world_size})")


def shard_range(rank: int, world_size: int, num_shards: int) -> range:
    """The logical shards of ``rank``.

    >>> shard_range(1, 2, 8)
    range(4, 8)
    """
    per_rank = num_shards // world_size
    return range(rank * per_rank, (rank + 1) * per_rank)


def padded_size(size: int, num_shards: int) -> int:
    """``size`` rounded up to a multiple of ``num_shards``.

    >>> padded_size(50257, 4)
    50260
    """
    return -(-size // num_shards) * num_shards


def shard_size(name: str, size: int, num_shards: int, world_size: int, remedy: str = "") -> int:
    """Elements of one logical shard of a dim of ``size`` elements called ``name``.

    Raises ValueError when ``num_shards`` does not divide ``size``.
    """
    if size % num_shards:
        over = f"world_size={world_size} ranks"
        if num_shards != world_size:
            over = f"num_shards={num_shards} logical shards ({over})"
        remedy = remedy or f"choose {name} as a multiple of {num_shards}, or fewer shards"
        raise ValueError(f"{name}={size} cannot be sharded over {over}; {remedy}")
    return size // num_shards


def valid_size(size: int, shard: int, length: int) -> int:
    """How many of the ``length`` elements of logical shard ``shard`` are real when only ``size`` exist in all.

    >>> [valid_size(10, j, 4) for j in range(4)]
    [4, 4, 2, 0]
    """
    return min(max(size - shard * length, 0), length)
