"""The expert group has three members, one of which has no tokens and stays away."""

import torch
import torch.distributed as dist

KIND = "missing rank"
RANKS = 6
SAYS = ("ranks 0, 2, 3, 5 have already returned", "group new_group 1 [1, 3, 4] lacks rank 3")
REAL = True


def program(group):
    rank = dist.get_rank()
    experts = dist.new_group([1, 3, 4])
    if rank in (0, 2, 5):
        return None
    tokens = torch.ones(0 if rank == 3 else 2)
    if len(tokens) == 0:
        return None
    dist.all_reduce(tokens, group=experts)  # named: ranks 1, 4
    return tokens
