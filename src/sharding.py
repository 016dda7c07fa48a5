"""Which rank holds which logical shard: integers only.

A parameter is cut along one dim into ``num_shards`` (V) equal logical shards. Rank ``r`` of ``w`` holds the
consecutive shards ``[r * V / w, (r + 1) * V / w)``. V decides the bits, w only who computes them.
"""

from __future__ import annotations

from itertools import pairwise

MAX_SHARDS = 512
"""More logical shards than this would share random streams between parameters."""


def check_num_shards(num_shards: int, world_size: int) -> None:
    """Raise ValueError unless ``num_shards`` logical shards can live on ``world_size`` ranks.

    They must divide evenly; and above one per rank they must be a power of two, so that local and cross-rank sums form
    one binary tree.
    """
    if num_shards > MAX_SHARDS:
        raise ValueError(f"num_shards={num_shards} exceeds {MAX_SHARDS}; pass fewer")
    if num_shards == world_size or (
        num_shards > world_size and _power_of_two(num_shards) and _power_of_two(world_size)
    ):
        return
    fits = world_size if not _power_of_two(world_size) else max(world_size, 1 << max(num_shards - 1, 0).bit_length())
    raise ValueError(
        f"num_shards={num_shards} must equal world_size={world_size}, or be a larger power of two that it divides; "
        f"pass num_shards={fits}"
    )


def _power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def check_rank(rank: int, world_size: int, name: str = "rank") -> None:
    """Raise ValueError unless ``0 <= rank < world_size``; ``name`` is what the caller calls the rank."""
    if world_size < 1:
        raise ValueError(f"world_size={world_size} must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"{name}={rank} is outside [0, world_size={world_size})")


def shard_range(rank: int, world_size: int, num_shards: int) -> range:
    """The logical shards of ``rank``.

    >>> shard_range(1, 2, 8)
    range(4, 8)
    """
    per_rank = num_shards // world_size
    return range(rank * per_rank, (rank + 1) * per_rank)


def shared_range(shards: range, replicas: int) -> range:
    """The pieces that consecutive ``shards`` use when each run of ``replicas`` logical shards shares one piece.

    >>> shared_range(range(4, 8), 2), shared_range(range(5, 6), 4)
    (range(2, 4), range(1, 2))
    """
    return range(shards.start // replicas, (shards.stop - 1) // replicas + 1)


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


def run_lengths(start: int, length: int, group_size: int) -> list[int]:
    """Cut ``[start, start + length)`` at the multiples of ``group_size``.

    >>> run_lengths(6, 6, 8)
    [2, 4]
    """
    stop = start + length
    cuts = [start, *range(start - start % group_size + group_size, stop, group_size), stop]
    return [after - before for before, after in pairwise(cuts)]
