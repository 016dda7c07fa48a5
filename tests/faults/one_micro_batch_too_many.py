"""A pipeline of two stages that disagree about the number of micro-batches."""

import torch
import torch.distributed as dist

KIND = "message"
RANKS = 2
SAYS = ("deadlock", "rank 0: send(float32[2])", "rank 1: send(float32[2])", "cycle: ")
SAYS_REAL = ("did not", "send(float32[2])")
REAL = True


def program(group):
    micro_batches = 4 if dist.get_rank() == 0 else 3
    x = torch.ones(2)
    if dist.get_rank() == 0:
        for _ in range(micro_batches):
            dist.send(x, dst=1)  # named: rank 0
        for _ in range(micro_batches):
            dist.recv(x, src=1)
    else:
        for _ in range(micro_batches):
            dist.recv(x, src=0)
        for _ in range(micro_batches):
            dist.send(x, dst=0)  # named: rank 1
    return x
