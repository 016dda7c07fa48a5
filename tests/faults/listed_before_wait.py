"""Two losses are turned into a Python list while they are still being summed."""

import torch
import torch.distributed as dist

KIND = "read before wait"
RANKS = 3
SAYS = ("before wait()", "all_reduce(SUM, float32[2])")
REAL = "whether the bytes have come is a matter of time there"
ORDER = "every rank is wrong; the first to come is named"


def program(group):
    losses = torch.tensor([1.0, 2.0])
    work = dist.all_reduce(losses, async_op=True)  # named: rank 0
    train, validation = losses.tolist()  # named: rank 0
    work.wait()
    return train, validation
