"""Hierarchical all-reduce: the sum over nodes starts before the sum inside the node has been waited for."""

import torch
import torch.distributed as dist

KIND = "read before wait"
RANKS = 4
SAYS = ("before wait()", "all_reduce(SUM, float32[8])")
REAL = "whether the bytes have come is a matter of time there"
ORDER = "every rank is wrong; the first to come is named"


def program(group):
    node, place = divmod(dist.get_rank(), 2)
    nodes = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    gradient = torch.ones(8)
    inner = dist.all_reduce(gradient, group=nodes[node], async_op=True)  # named: rank 0
    outer = dist.all_reduce(gradient, group=across[place], async_op=True)  # named: rank 0
    inner.wait()
    outer.wait()
    return gradient
