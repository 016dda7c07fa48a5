"""A project's own layers: rank 1 has read ``layers=1`` and leaves the model a layer too early."""

import torch
import torch.distributed as dist
from torch import nn

from src.modeling import RowParallelLinear

KIND = "group"
RANKS = 4
SAYS = ("different operations", "rank 1: barrier()", "all_reduce(SUM, float32[2, 8])")
MODULE = "1"
REAL = True


class Layer(RowParallelLinear):
    def forward(self, x):
        x = x.chunk(dist.get_world_size(), -1)[dist.get_rank()]
        return super().forward(x)  # named: ranks 0, 2-3, forward


def program(group):
    layers = 1 if dist.get_rank() == 1 else 2
    model = nn.Sequential(*[Layer(8, 8, group=group) for _ in range(layers)])
    y = model(torch.ones(2, 8))
    dist.barrier()  # named: rank 1
    return y
