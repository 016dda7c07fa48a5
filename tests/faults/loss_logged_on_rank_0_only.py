"""``if rank == 0:`` around the logging, and in it the average over the ranks."""

import torch
import torch.distributed as dist

KIND = "branch"
RANKS = 4
SAYS = ("different operations", "ranks 1-3: barrier()")
REAL = True


def average(x):
    dist.all_reduce(x)  # named: rank 0
    return x / dist.get_world_size()


def program(group):
    log = []
    loss = torch.tensor(1.0 + dist.get_rank())
    if dist.get_rank() == 0:
        log.append(average(loss))
    dist.barrier()  # named: ranks 1-3
    return log
