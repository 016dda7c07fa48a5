"""A helper thread reports the progress of all ranks with a collective of its own."""

import threading

import torch
import torch.distributed as dist

KIND = "foreign thread"
RANKS = 2
SAYS = ("all_reduce called from thread 'heartbeat'", "which is no rank")
REAL = "a process has no rank threads: any of its threads may call"
ORDER = "every rank is wrong; the first to come is named"


def heartbeat(step):
    dist.all_reduce(torch.tensor(step))  # named: rank 0


def program(group):
    helper = threading.Thread(target=heartbeat, args=(1,), name="heartbeat")
    helper.start()
    helper.join()
    gradient = torch.ones(3)
    dist.all_reduce(gradient)
    return gradient
