"""Each rank makes only the group with its right neighbour; new_group must be called for all groups by all ranks."""

import torch
import torch.distributed as dist

KIND = "group"
RANKS = 3
SAYS = ("deadlock", "cycle: ")
SAYS_REAL = ("[0, 1]", "[1, 2]", "[0, 2]")
REAL = True


def program(group):
    rank = dist.get_rank()
    neighbours = dist.new_group(sorted([rank, (rank + 1) % 3]))
    x = torch.ones(1)
    dist.all_reduce(x, group=neighbours)  # named: ranks 0-2, simulated
    return x
