"""Rank 1 scales its features by a size that leaves it fewer columns: its gradients gather differently."""

import torch
import torch.distributed as dist

from src.distributed import scatter_to_region

KIND = "shape"
RANKS = 2
SAYS = ("different shapes", "rank 0: all_gather(float32[12], float32[6])", "rank 1: all_gather(float32[8], float32[4])")
REAL = True


def program(group):
    columns = 6 if dist.get_rank() == 0 else 4
    x = torch.ones(2, columns, requires_grad=True)
    y = scatter_to_region(x, group=group)
    y.sum().backward()  # named: ranks 0-1, backward
    return x.grad
