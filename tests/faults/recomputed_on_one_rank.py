"""Rank 0 is short of memory and recomputes its layer in backward, all-reduce included."""

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from src.distributed import reduce_from_region

KIND = "branch"
RANKS = 2
SAYS = ("different operations", "rank 1: barrier()")
REAL = True


class Layer(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.group, self.linear = group, nn.Linear(4, 4)

    def forward(self, x):
        return reduce_from_region(self.linear(x), group=self.group).sin()  # named: rank 0, backward


def program(group):
    layer, x = Layer(group), torch.ones(2, 4, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False) if dist.get_rank() == 0 else layer(x)
    y.sum().backward()
    dist.barrier()  # named: rank 1
