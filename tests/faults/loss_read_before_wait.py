"""The loss is logged while its all-reduce is still under way."""

import torch
import torch.distributed as dist

KIND = "read before wait"
RANKS = 2
SAYS = ("before wait()", "all_reduce(SUM, float32[1])")
REAL = "whether the bytes have come is a matter of time there"
ORDER = "every rank is wrong; the first to come is named"


def program(group):
    loss = torch.tensor([1.0 + dist.get_rank()])
    work = dist.all_reduce(loss, async_op=True)  # named: rank 0
    message = f"loss {loss.item():.3f}"  # named: rank 0
    work.wait()
    return message
