"""The gradients lie in a dict whose order is that in which each rank happened to fill it."""

import torch
import torch.distributed as dist

KIND = "order"
RANKS = 2
SAYS = ("different shapes", "rank 0: all_reduce(SUM, float32[4, 2])", "rank 1: all_reduce(SUM, float32[4])")
REAL = True


def program(group):
    gradients = {"weight": torch.ones(4, 2), "bias": torch.ones(4)}
    if dist.get_rank() == 1:
        gradients = {"bias": gradients["bias"], "weight": gradients["weight"]}
    works = [dist.all_reduce(g, async_op=True) for g in gradients.values()]  # named: ranks 0-1
    for work in works:
        work.wait()
    return gradients
