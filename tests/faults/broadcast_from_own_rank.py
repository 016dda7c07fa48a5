"""Every rank names itself as the source of the initial weights."""

import torch
import torch.distributed as dist

KIND = "root"
RANKS = 3
SAYS = ("different roots", "rank 0: broadcast(root=0", "rank 2: broadcast(root=2")
REAL = True


def program(group):
    weight = torch.randn(4, 4)
    dist.broadcast(weight, src=dist.get_rank())  # named: ranks 0-2
    return weight
