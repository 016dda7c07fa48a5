"""The buffer that an asynchronous all-gather still reads is filled with the next batch."""

import torch
import torch.distributed as dist

KIND = "read before wait"
RANKS = 2
SAYS = ("before wait()", "all_gather(float32[3])")
REAL = "whether the bytes have gone is a matter of time there"
ORDER = "every rank is wrong; the first to come is named"


def program(group):
    features = torch.full((3,), 1.0 + dist.get_rank())
    parts = [torch.empty(3) for _ in range(2)]
    work = dist.all_gather(parts, features, async_op=True)  # named: rank 0
    features.copy_(torch.zeros(3))  # named: rank 0
    work.wait()
    return torch.cat(parts)
