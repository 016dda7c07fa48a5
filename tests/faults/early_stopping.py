"""Early stopping decides by the local loss: rank 2 is satisfied one step before the others."""

import torch
import torch.distributed as dist

KIND = "early return"
RANKS = 4
SAYS = ("rank 2 has already returned", "lacks rank 2")
SAYS_REAL = ("rank 2 did not come to all_reduce",)
REAL = True


def program(group):
    loss = 1.0 if dist.get_rank() == 2 else 2.0
    for _step in range(4):
        gradient = torch.full((5,), loss)
        dist.all_reduce(gradient)  # named: ranks 0-1, 3
        loss /= 2
        if loss < 0.5:
            return loss
    return loss
