"""Sequence parallelism: the gradients of the norms must be summed by all ranks; here rank 0 alone does it."""

import torch
import torch.distributed as dist
from torch import nn

KIND = "optimizer"
RANKS = 8
SAYS = ("different shapes", "rank 0: all_reduce(SUM, float32[4])", "ranks 1-7: all_reduce(SUM, float32[])")
REAL = True


def sum_norm_gradients(model):
    for name, parameter in model.named_parameters():
        if "norm" in name and dist.get_rank() == 0:
            dist.all_reduce(parameter.grad)  # named: rank 0


def program(group):
    model = nn.Sequential()
    model.norm, model.head = nn.LayerNorm(4), nn.Linear(4, 2)
    loss = model(torch.randn(3, 4)).square().sum()
    loss.backward()
    sum_norm_gradients(model)
    loss = loss.detach()
    dist.all_reduce(loss)  # named: ranks 1-7
    return loss
