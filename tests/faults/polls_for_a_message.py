"""Rank 1 polls for a message that rank 0 sends only after rank 1's answer."""

import time

import torch
import torch.distributed as dist

KIND = "polling"
RANKS = 2
SAYS = ("deadlock", "rank 0 has not sent it", "rank 1 has not sent it")
SAYS_REAL = "rank 1 did not send"
REAL = True


def program(group):
    x = torch.ones(2)
    if dist.get_rank() == 0:
        dist.recv(x, src=1)  # named: rank 0
        dist.send(x, dst=1)
        return x
    work = dist.irecv(x, src=0)  # named: rank 1, simulated
    deadline = time.monotonic() + 4
    while not work.is_completed() and time.monotonic() < deadline:
        time.sleep(0.001)
    dist.send(x, dst=0)
    return x
