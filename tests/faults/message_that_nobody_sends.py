"""Rank 2 waits for a message of rank 1, which sent it to rank 0 alone."""

import torch
import torch.distributed as dist

KIND = "message"
RANKS = 3
SAYS = ("already returned", "rank 2: recv(float32[4])", "rank 1 has not sent it")
SAYS_REAL = ("rank 1 did not send", "recv(float32[4])")
REAL = True


def program(group):
    x = torch.full((4,), float(dist.get_rank()))
    if dist.get_rank() == 1:
        dist.send(x, dst=0)
    else:
        dist.recv(x, src=1)  # named: rank 2
    return x
