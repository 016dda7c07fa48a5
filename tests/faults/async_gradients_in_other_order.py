"""Two gradients of one shape, reduced asynchronously, in another order on the odd ranks."""

import torch
import torch.distributed as dist

KIND = "order"
RANKS = 4
SAYS = "collectives in different order on different ranks"
REAL = True


def program(group):
    query, key = torch.full((4, 4), 1.0), torch.full((4, 4), 100.0)
    if dist.get_rank() % 2 == 0:
        first = dist.all_reduce(query, async_op=True)  # named: ranks 0, 2
        second = dist.all_reduce(key, async_op=True)  # named: ranks 0, 2
    else:
        first = dist.all_reduce(key, async_op=True)  # named: ranks 1, 3
        second = dist.all_reduce(query, async_op=True)  # named: ranks 1, 3
    first.wait()
    second.wait()
    return query, key
