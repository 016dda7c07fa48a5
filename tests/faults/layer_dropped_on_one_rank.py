"""Stochastic depth whose coin each rank tosses for itself."""

import torch
import torch.distributed as dist
from torch import nn

from src.distributed import reduce_from_region

KIND = "branch"
RANKS = 2
SAYS = ("different operations", "rank 0: all_reduce", "rank 1: barrier()")
MODULE = "1"
REAL = True


class Block(nn.Module):
    def __init__(self, group, keep):
        super().__init__()
        self.group, self.keep, self.linear = group, keep, nn.Linear(4, 4)

    def forward(self, x):
        if torch.rand(()) > self.keep:
            return x
        return x + reduce_from_region(self.linear(x), group=self.group)  # named: rank 0, forward


def program(group):
    model = nn.Sequential(Block(group, 1.0), Block(group, 0.5))
    torch.manual_seed(7 + dist.get_rank())
    model(torch.ones(1, 4))
    dist.barrier()  # named: rank 1
