"""src is a rank of the world, not of the group: rank 0 is no member of [2, 3]."""

import torch
import torch.distributed as dist

KIND = "root"
RANKS = 4
SAYS = "is not part of group"
REAL = True
ORDER = "ranks 2 and 3 both raise; the first to come is named"


def program(group):
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    x = torch.full((2,), float(rank))
    dist.broadcast(x, src=0, group=pairs[rank // 2])  # named: rank 2, simulated
    return x
