"""The last stage sends its output on, although there is no next stage that receives it."""

import torch
import torch.distributed as dist

KIND = "message"
RANKS = 2
SAYS = ("rank 0 has already returned", "rank 1: send(float32[2, 4])", "rank 0 has not received it")
SAYS_REAL = ("rank 0 did not", "send(float32[2, 4])")
REAL = True


def program(group):
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    x = torch.ones(2, 4)
    if rank > 0:
        dist.recv(x, src=rank - 1)
    dist.send(x, dst=(rank + 1) % (last + 1))  # named: rank 1
    return x
