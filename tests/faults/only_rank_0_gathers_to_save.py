"""Rank 0 collects the sharded weight for the checkpoint; the others go home."""

import torch
import torch.distributed as dist

KIND = "branch"
RANKS = 5
SAYS = ("ranks 1-4 have already returned", "lacks ranks 1-4")
REAL = True


def full(shard):
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard)  # named: rank 0
    return torch.cat(parts)


def program(group):
    shard = torch.full((2, 3), float(dist.get_rank()))
    return {"weight": full(shard)} if dist.get_rank() == 0 else None
