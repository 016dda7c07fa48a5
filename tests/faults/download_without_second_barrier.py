"""Rank 0 downloads while the others wait in a barrier, but forgets to call that barrier itself."""

import torch
import torch.distributed as dist

KIND = "op"
RANKS = 4
SAYS = "different operations"
REAL = True


def program(group):
    rank = dist.get_rank()
    if rank != 0:
        dist.barrier()  # named: ranks 1-3
    data = torch.arange(8.0)  # rank 0 downloads, the others find it in the cache
    total = data[rank::4].sum()
    dist.all_reduce(total)  # named: rank 0
    return total
