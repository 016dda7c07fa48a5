"""Rank 0, which prints the loss, collects it with reduce(); the others use all_reduce()."""

import torch
import torch.distributed as dist

KIND = "op"
RANKS = 3
SAYS = "different operations"
REAL = True


def program(group):
    loss = torch.tensor([2.0 + dist.get_rank()])
    if dist.get_rank() == 0:
        dist.reduce(loss, dst=0)  # named: rank 0
    else:
        dist.all_reduce(loss)  # named: ranks 1-2
    return loss / dist.get_world_size()
