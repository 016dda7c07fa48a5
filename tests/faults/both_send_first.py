"""Two neighbours exchange their borders; both send before they receive."""

import torch
import torch.distributed as dist

KIND = "message"
RANKS = 2
SAYS = ("deadlock", "cycle: rank 0 waits for rank 1 waits for rank 0")
SAYS_REAL = ("did not", "send(float32[5])")
REAL = True


def program(group):
    mine, theirs = torch.ones(5), torch.empty(5)
    other = 1 - dist.get_rank()
    dist.send(mine, dst=other)  # named: ranks 0-1
    dist.recv(theirs, src=other)
    return theirs
