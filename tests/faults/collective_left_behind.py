"""An asynchronous all-reduce that is never waited for, and that rank 2 never calls."""

import torch
import torch.distributed as dist

KIND = "missing rank"
RANKS = 3
SAYS = ("all ranks have returned, but some never joined a call", "lacks rank 2")
SAYS_REAL = "rank 2 did not come to all_reduce"
REAL = True


def program(group):
    statistics = torch.ones(2)
    if dist.get_rank() < 2:
        dist.all_reduce(statistics, async_op=True)  # named: ranks 0-1
    return "done"
