"""DDP around models of different sizes: rank 1 still runs the configuration with a bias."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

KIND = "data parallel"
RANKS = 2
SAYS = ("DDP expects same model across all ranks", "Rank 1 has 2 params", "rank 0 has inconsistent 1 params")
SAYS_REAL = "DDP expects same model across all ranks"
REAL = True
ORDER = "both ranks raise; the first to come is named"


def program(group):
    model = nn.Linear(3, 2, bias=dist.get_rank() == 1)
    replica = DistributedDataParallel(model)  # named: rank 1, simulated
    replica(torch.ones(1, 3)).sum().backward()
    return model.weight.grad
