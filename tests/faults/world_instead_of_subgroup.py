"""Rank 2 forgets ``group=`` and calls the whole world."""

import torch
import torch.distributed as dist

KIND = "group"
RANKS = 4
SAYS = ("deadlock", "rank 0:", "lacks rank 2", "rank 2:", "lacks ranks 0, 1, 3")
SAYS_REAL = ("did not come", "lacks rank 2", "lacks ranks 0, 1, 3")
REAL = True


def program(group):
    rank = dist.get_rank()
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    x = torch.ones(3)
    if rank == 2:
        dist.all_reduce(x)  # named: rank 2
    else:
        dist.all_reduce(x, group=halves[rank % 2])  # named: rank 0
    return x
