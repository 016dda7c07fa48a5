"""DTensor.full_tensor() is a collective, and only rank 0 calls it."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

KIND = "branch"
RANKS = 4
SAYS = ("different operations", "rank 0: all_gather", "ranks 1-3: barrier()")
REAL = True


def program(group):
    mesh = dist.init_device_mesh("cpu", (4,))
    weight = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)], src_data_rank=None)
    saved = None
    if dist.get_rank() == 0:
        saved = weight.full_tensor()  # named: rank 0
    dist.barrier()  # named: ranks 1-3
    return saved
