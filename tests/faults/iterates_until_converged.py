"""Each rank iterates until its own error is small: the number of all-reduces depends on the data."""

import torch
import torch.distributed as dist

KIND = "loop length"
RANKS = 3
SAYS = "different operations"
REAL = True


def program(group):
    error = torch.tensor(4.0 ** (dist.get_rank() + 1))
    x = torch.ones(2)
    while error > 1:
        dist.all_reduce(x)  # named: ranks 1-2
        x /= dist.get_world_size()
        error = error / 4
    parts = [torch.empty(2) for _ in range(3)]
    dist.all_gather(parts, x)  # named: rank 0
    return parts
