"""A ring in which every rank receives from the left before it sends to the right."""

import torch
import torch.distributed as dist

KIND = "message"
RANKS = 5
SAYS = (
    "deadlock",
    "cycle: rank 0 waits for rank 4 waits for rank 3 waits for rank 2 waits for rank 1",
)
REAL = True


def program(group):
    rank, size = dist.get_rank(), dist.get_world_size()
    keys, incoming = torch.ones(2, 3), torch.empty(2, 3)
    for _ in range(size - 1):
        dist.recv(incoming, src=(rank - 1) % size)  # named: ranks 0-4
        dist.send(keys, dst=(rank + 1) % size)
        keys.copy_(incoming)
    return keys
