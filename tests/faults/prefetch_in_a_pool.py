"""The next batch is broadcast from a thread pool, so that it overlaps with computation."""

from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

KIND = "foreign thread"
RANKS = 3
SAYS = ("broadcast called from thread 'prefetch_0'", "which is no rank")
REAL = "a process has no rank threads: any of its threads may call"
ORDER = "every rank is wrong; the first to come is named"


def next_batch(step):
    batch = torch.full((4,), float(step))
    dist.broadcast(batch, src=0)  # named: rank 0
    return batch


def program(group):
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        coming = pool.submit(next_batch, 0)
        return coming.result().sum()
