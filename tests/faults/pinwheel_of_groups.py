"""A 2 x 2 mesh: half of the ranks reduce over rows first, the other half over columns first."""

import torch
import torch.distributed as dist

KIND = "deadlock cycle"
RANKS = 4
SAYS = ("deadlock", "cycle: rank 0 waits for rank 1 waits for rank 3 waits for rank 2 waits for rank 0")
SAYS_REAL = "did not come to all_reduce"
REAL = True


def program(group):
    row, column = divmod(dist.get_rank(), 2)
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    x = torch.ones(2)
    if row == column:
        dist.all_reduce(x, group=rows[row])  # named: ranks 0, 3
        dist.all_reduce(x, group=columns[column])
    else:
        dist.all_reduce(x, group=columns[column])  # named: ranks 1-2
        dist.all_reduce(x, group=rows[row])
    return x
