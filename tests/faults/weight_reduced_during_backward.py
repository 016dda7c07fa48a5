"""A weight is averaged asynchronously while backward still needs it."""

import torch
import torch.distributed as dist

KIND = "read before wait"
RANKS = 3
SAYS = ("before wait()", "all_reduce(SUM, float32[4, 4])")
REAL = "whether the bytes have come is a matter of time there"
ORDER = "every rank is wrong; the first to come is named"


def program(group):
    weight = torch.ones(4, 4, requires_grad=True)
    x = torch.ones(2, 4, requires_grad=True)
    loss = (x @ weight).sum()
    work = dist.all_reduce(weight.data, async_op=True)  # named: rank 0
    loss.backward()  # named: rank 0
    work.wait()
    return x.grad
