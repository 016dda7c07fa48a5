"""Rank 1 catches an out-of-memory error and skips the batch, and with it one all-reduce."""

import torch
import torch.distributed as dist

KIND = "missing rank"
RANKS = 4
SAYS = ("rank 1 has already returned", "collective 3 of group world")
SAYS_REAL = "rank 1 did not come to all_reduce"
REAL = True


def gradient_of(batch):
    if batch > 40:
        raise torch.OutOfMemoryError(f"no room for {batch} samples")
    return torch.full((3,), float(batch))


def program(group):
    total = torch.zeros(3)
    for batch in (16, 64 if dist.get_rank() == 1 else 32, 16):
        try:
            gradient = gradient_of(batch)
        except torch.OutOfMemoryError:
            continue
        dist.all_reduce(gradient)  # named: ranks 0, 2-3
        total += gradient
    return total
