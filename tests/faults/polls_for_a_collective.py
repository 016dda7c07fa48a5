"""All ranks but one poll a barrier, which the last rank has left out."""

import torch
import torch.distributed as dist

KIND = "polling"
RANKS = 6
SAYS = ("deadlock", "rank 5 has already returned", "lacks rank 5")
REAL = True


def program(group):
    counted = torch.zeros(())
    if dist.get_rank() < 5:
        work = dist.barrier(async_op=True)  # named: ranks 0-4
        while not work.is_completed():
            counted += 1
    return counted
