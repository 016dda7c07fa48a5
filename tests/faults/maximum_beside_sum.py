"""Each rank takes the reduction from its own configuration; one of them is an old one."""

import torch
import torch.distributed as dist

KIND = "reduce-op"
RANKS = 4
SAYS = ("different reduce-ops", "ranks 0, 2, 3: all_reduce(SUM", "rank 1: all_reduce(MAX")
REAL = True


def configuration(rank):
    return {"grad_norm": dist.ReduceOp.MAX if rank == 1 else dist.ReduceOp.SUM}


def program(group):
    norm = torch.ones(1)
    dist.all_reduce(norm, op=configuration(dist.get_rank())["grad_norm"])  # named: ranks 0-3
    return norm.sqrt()
