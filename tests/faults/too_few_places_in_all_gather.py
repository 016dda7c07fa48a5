"""The list for the gathered tensors has been made for a world of two, and the job runs with three."""

import torch
import torch.distributed as dist

KIND = "splits"
RANKS = 3
SAYS = "all_gather: "
REAL = "every rank is wrong in the same way: gloo itself refuses the call"


def program(group):
    x = torch.ones(4)
    parts = [torch.empty(4) for _ in range(2)]
    dist.all_gather(parts, x)  # named: ranks 0-2
    return torch.cat(parts)
