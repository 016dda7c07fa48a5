"""Sequence parallelism over eight ranks; one rank did not pad its part of the sequence."""

import torch
import torch.distributed as dist

KIND = "shape"
RANKS = 8
SAYS = ("different shapes", "rank 5: all_gather(float32[56, 4], float32[7, 4])")
REAL = True


def program(group):
    length = 7 if dist.get_rank() == 5 else 8
    part = torch.ones(length, 4)
    whole = torch.empty(8 * length, 4)
    dist.all_gather_into_tensor(whole, part)  # named: ranks 0-7
    return whole
