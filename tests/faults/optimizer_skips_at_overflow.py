"""A gradient overflows on rank 1 alone, which skips the step and with it the sum of the norms."""

import torch
import torch.distributed as dist
from torch import nn

KIND = "optimizer"
RANKS = 4
SAYS = ("different operations", "rank 1: barrier()")
REAL = True


def step(weight, optimizer):
    if not weight.grad.isfinite().all():
        return
    norm = weight.grad.square().sum()
    dist.all_reduce(norm)  # named: ranks 0, 2-3
    weight.grad /= norm.sqrt()
    optimizer.step()


def program(group):
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for scale in (1.0, float("inf") if dist.get_rank() == 1 else 2.0):
        optimizer.zero_grad()
        (weight * scale).sum().backward()
        step(weight, optimizer)
    dist.barrier()  # named: rank 1
    return weight
