"""A hook that averages a gradient, registered on the rank of the first pipeline stage alone."""

import torch
import torch.distributed as dist
from torch import nn

KIND = "branch"
RANKS = 4
SAYS = ("different shapes", "rank 0: all_reduce(SUM, float32[3, 2])", "ranks 1-3: all_reduce(SUM, float32[])")
REAL = True


def average(gradient):
    gradient = gradient / dist.get_world_size()
    dist.all_reduce(gradient)  # named: rank 0, backward
    return gradient


def program(group):
    model = nn.Linear(2, 3)
    if dist.get_rank() == 0:
        model.weight.register_hook(average)
    loss = model(torch.ones(1, 2)).sum()
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)  # named: ranks 1-3, forward
    return loss
