"""Gradients are reduced asynchronously, and the optimizer does not wait for the last one."""

import torch
import torch.distributed as dist
from torch import nn

KIND = "read before wait"
RANKS = 4
SAYS = ("before wait()", "all_reduce(SUM, float32[3])")
REAL = "whether the bytes have come is a matter of time there"
ORDER = "every rank is wrong; the first to come is named"


def program(group):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    works = []
    for parameter in model.parameters():
        works.append(dist.all_reduce(parameter.grad, async_op=True))  # named: rank 3
    for work in works[:-1]:
        work.wait()
    optimizer.step()  # named: rank 3
    works[-1].wait()
    return model.weight
