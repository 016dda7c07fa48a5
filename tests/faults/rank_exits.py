"""Rank 0 has written the final checkpoint and leaves the program with sys.exit()."""

import sys

import torch
import torch.distributed as dist

KIND = "exception"
RANKS = 2
SAYS = "rank 0 raised SystemExit: 0"
SAYS_REAL = "rank 0 did not come to barrier"
REAL = True
ORDER = "whether rank 1 waits already when rank 0 exits"


def program(group):
    weight = torch.ones(2)
    dist.all_reduce(weight)
    if dist.get_rank() == 0:
        sys.exit(0)  # named: rank 0, simulated
    dist.barrier()
    return weight
