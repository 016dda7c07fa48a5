"""Rank 2 finds its loss to be NaN and leaves out backward, in which the others sum the gradients of their layers."""

import torch
import torch.distributed as dist
from torch import nn

from src.distributed import copy_to_region

KIND = "missing rank"
RANKS = 4
SAYS = ("rank 2 has already returned", "lacks rank 2")
SAYS_REAL = "rank 2 did not come to all_reduce"
MODULE = "layers.2"
REAL = True


class Layer(nn.Linear):
    def __init__(self, group):
        super().__init__(4, 4)
        self.group = group

    def forward(self, x):
        return super().forward(copy_to_region(x, group=self.group))


def program(group):
    model = nn.Sequential()
    model.layers = nn.Sequential(*[Layer(group) for _ in range(3)])
    loss = model(torch.full((1, 4), float("nan") if dist.get_rank() == 2 else 1.0)).sum()
    if not loss.isnan():
        loss.backward()  # named: ranks 0-1, 3, backward
