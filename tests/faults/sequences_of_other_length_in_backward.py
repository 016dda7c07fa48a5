"""Rank 1 cuts its sequence shorter; forward needs no communication, so backward is the first to notice."""

import torch
import torch.distributed as dist
from torch import nn

from src.distributed import copy_to_region

KIND = "shape"
RANKS = 3
SAYS = ("different shapes", "rank 1: all_reduce(SUM, float32[2, 5, 4])")
MODULE = "layers.1"
REAL = True


class Block(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.group, self.linear = group, nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(copy_to_region(x, group=self.group))


def program(group):
    model = nn.Sequential()
    model.layers = nn.Sequential(Block(group), Block(group))
    x = torch.ones(2, 5 if dist.get_rank() == 1 else 6, 4)
    model(x).sum().backward()  # named: ranks 0-2, backward
