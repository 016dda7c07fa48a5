"""DDP: rank 3 accumulates gradients for one step longer, under no_sync()."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

KIND = "data parallel"
RANKS = 4
SAYS = ("rank 3 has already returned", "lacks rank 3")
SAYS_REAL = "rank 3 did not come to all_reduce"
REAL = True


def program(group):
    model = DistributedDataParallel(nn.Linear(3, 2))
    synced_steps = (0, 1, 3) if dist.get_rank() == 3 else (0, 1, 2, 3)
    for step in range(4):
        waits = step in synced_steps
        with contextlib.nullcontext() if waits else model.no_sync():
            model(torch.ones(1, 3)).sum().backward()  # named: ranks 0-2, backward
    return model.module.weight.grad
