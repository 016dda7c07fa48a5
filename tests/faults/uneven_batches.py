"""Rank 7 has one batch fewer than the others, so it leaves the epoch's loop before them."""

import torch
import torch.distributed as dist

KIND = "early return"
RANKS = 8
SAYS = ("rank 7 has already returned", "collective 4 of group world", "rank 7 returned after all_reduce")
REAL = True


def batches(rank):
    return torch.arange(62.0)[rank * 8 : (rank + 1) * 8].split(2)


def program(group):
    total = torch.zeros(())
    for batch in batches(dist.get_rank()):
        loss = batch.mean()
        dist.all_reduce(loss)  # named: ranks 0-6
        total += loss
    return total
