"""Ten predictions over four ranks: the last one gathers a smaller tensor."""

import torch
import torch.distributed as dist

KIND = "shape"
RANKS = 4
SAYS = ("different shapes", "rank 3: all_gather(float32[1])", "ranks 0-2: all_gather(float32[3])")
REAL = True


def program(group):
    predictions = torch.arange(10.0).chunk(dist.get_world_size())[dist.get_rank()]
    gathered = [torch.empty_like(predictions) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, predictions)  # named: ranks 0-3
    return torch.cat(gathered)
