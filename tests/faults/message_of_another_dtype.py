"""The third of four pipeline stages runs in bfloat16, the fourth receives float32."""

import torch
import torch.distributed as dist

KIND = "message"
RANKS = 4
SAYS = ("a message does not fit", "rank 2: send(bfloat16[4])", "rank 3: recv(float32[4])")
REAL = True


def program(group):
    rank = dist.get_rank()
    x = torch.ones(4)
    if rank > 0:
        dist.recv(x, src=rank - 1)  # named: rank 3
    y = (x * 2).bfloat16() if rank == 2 else x * 2
    if rank < 3:
        dist.send(y, dst=rank + 1)  # named: rank 2
    return y
