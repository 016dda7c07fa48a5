"""The configuration is broadcast by rank 0 and gathered by the others."""

import torch.distributed as dist

KIND = "op"
RANKS = 3
SAYS = ("different operations", "rank 0: broadcast(", "ranks 1, 2: all_gather(")
REAL = True


def program(group):
    configuration = [{"layers": 4, "rank": dist.get_rank()}]
    if dist.get_rank() == 0:
        dist.broadcast_object_list(configuration, src=0)  # named: rank 0
    else:
        everything = [None] * dist.get_world_size()
        dist.all_gather_object(everything, configuration)  # named: ranks 1-2
    return configuration
