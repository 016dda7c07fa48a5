"""The next micro-batch is written into the buffer that isend() is still sending."""

import torch
import torch.distributed as dist

KIND = "read before wait"
RANKS = 2
SAYS = ("before wait()", "send(float32[3])")
REAL = "whether the bytes have gone is a matter of time there"


def program(group):
    buffer = torch.ones(3)
    if dist.get_rank() == 0:
        work = dist.isend(buffer, dst=1)  # named: rank 0
        buffer.fill_(2.0)  # named: rank 0
        work.wait()
    else:
        dist.recv(buffer, src=0)
    return buffer
