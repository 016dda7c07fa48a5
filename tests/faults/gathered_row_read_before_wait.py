"""A row of the gathered activations is used, through a view, before the gather has been waited for."""

import torch
import torch.distributed as dist

KIND = "read before wait"
RANKS = 7
SAYS = ("before wait()", "all_gather(float32[28], float32[4])")
REAL = "whether the bytes have come is a matter of time there"
ORDER = "every rank is wrong; the first to come is named"


def program(group):
    whole = torch.zeros(7 * 4)
    rows = whole.view(7, 4)
    work = dist.all_gather_into_tensor(whole, torch.ones(4), async_op=True)  # named: rank 0
    own = torch.ones(4) * 2
    neighbour = rows[(dist.get_rank() + 1) % 7]
    score = own @ neighbour  # named: rank 0
    work.wait()
    return score
