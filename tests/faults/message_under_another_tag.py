"""Activations are sent under one tag and awaited under another."""

import torch
import torch.distributed as dist

KIND = "message"
RANKS = 2
SAYS = ("deadlock", "rank 1 has not received it", "rank 0 has not sent it", "tag 1", "tag 2")
SAYS_REAL = ("rank 0 did not send", "tag 2")
REAL = True

ACTIVATIONS, GRADIENTS = 1, 2


def program(group):
    x = torch.ones(4)
    if dist.get_rank() == 0:
        dist.send(x, dst=1, tag=ACTIVATIONS)  # named: rank 0
    else:
        dist.recv(x, src=0, tag=GRADIENTS)  # named: rank 1
    return x
