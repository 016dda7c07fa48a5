"""Each half makes its own group; new_group must be called for both groups by all ranks, in the same order."""

import torch
import torch.distributed as dist

KIND = "group"
RANKS = 4
SAYS = ("new_group", "[0, 1]", "[2, 3]")
REAL = True


def program(group):
    x = torch.ones(2)
    if dist.get_rank() < 2:
        x *= 10
        half = dist.new_group([0, 1])  # named: ranks 0-1
    else:
        half = dist.new_group([2, 3])  # named: ranks 2-3
    dist.all_reduce(x, group=half)
    return x
