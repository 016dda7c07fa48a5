"""Rank 0 posts two messages, rank 1 receives one, and nobody waits for the other."""

import torch
import torch.distributed as dist

KIND = "message"
RANKS = 2
SAYS = ("all ranks have returned, but some never joined a call", "rank 1 has not received it")
REAL = "nobody waits, so no process notices"


def program(group):
    x = torch.ones(2)
    if dist.get_rank() == 0:
        works = []
        for tag in (0, 1):
            works.append(dist.isend(x, dst=1, tag=tag))  # named: rank 0
        works[0].wait()
    else:
        dist.recv(x, src=0, tag=0)
    return x
