"""Two groups of the same two ranks: one rank finishes the tensor group first, the other the data group."""

import torch
import torch.distributed as dist

KIND = "deadlock cycle"
RANKS = 2
SAYS = ("deadlock", "cycle: rank 0 waits for rank 1 waits for rank 0", "new_group 1 [0, 1]", "new_group 2 [0, 1]")
SAYS_REAL = "did not come to"
REAL = True


def program(group):
    tensor, data = dist.new_group([0, 1]), dist.new_group([0, 1])
    activations, gradients = torch.ones(4), torch.ones(6)
    if dist.get_rank() == 0:
        dist.all_reduce(activations, group=tensor)  # named: rank 0
        dist.all_reduce(gradients, group=data)
    else:
        dist.all_reduce(gradients, group=data)  # named: rank 1
        dist.all_reduce(activations, group=tensor)
    return activations, gradients
