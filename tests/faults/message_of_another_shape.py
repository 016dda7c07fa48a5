"""A stage sends [sequence, batch], the next one expects [batch, sequence]."""

import torch
import torch.distributed as dist

KIND = "message"
RANKS = 2
SAYS = ("a message does not fit", "send(float32[8, 2])", "recv(float32[2, 8])")
REAL = True


def program(group):
    if dist.get_rank() == 0:
        hidden = torch.ones(8, 2)
        dist.send(hidden, dst=1)  # named: rank 0
    else:
        hidden = torch.empty(2, 8)
        dist.recv(hidden, src=0)  # named: rank 1
    return hidden
