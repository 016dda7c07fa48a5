"""Only rank 4 runs under autocast before the region, so that its gradient comes back in bfloat16."""

import torch
import torch.distributed as dist
from torch import nn

from src.distributed import copy_to_region

KIND = "dtype"
RANKS = 6
SAYS = ("different dtypes", "rank 4: all_reduce(SUM, bfloat16[2, 4])", "ranks 0-3, 5: all_reduce(SUM, float32[2, 4])")
REAL = True


def program(group):
    before, after = nn.Linear(3, 4), nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=dist.get_rank() == 4):
        x = before(torch.ones(2, 3))
        y = after(copy_to_region(x, group=group))
    y.float().sum().backward()  # named: ranks 0-5, backward
