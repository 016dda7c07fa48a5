"""A batch of rank 1 lacks a key; the others wait for its loss."""

import torch
import torch.distributed as dist

KIND = "exception"
RANKS = 3
SAYS = "rank 1 raised KeyError: 'label'"
SAYS_REAL = "rank 1 did not come to all_reduce"
REAL = True
ORDER = "who waits already when rank 1 raises"


def program(group):
    batch = {"input": torch.ones(2), "label": torch.ones(2)}
    if dist.get_rank() == 1:
        batch = {"input": torch.ones(2)}
    loss = batch["input"] - batch["label"]  # named: rank 1, simulated
    dist.all_reduce(loss)  # named: rank 0, simulated
    return loss
