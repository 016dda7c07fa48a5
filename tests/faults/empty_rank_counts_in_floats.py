"""A rank without any tokens counts them as 0.0, the others as integers."""

import torch
import torch.distributed as dist

KIND = "dtype"
RANKS = 2
SAYS = ("different dtypes", "rank 0: all_reduce(SUM, int64[])", "rank 1: all_reduce(SUM, float32[])")
REAL = True


def count(tokens):
    return (tokens != 0).sum() if len(tokens) else torch.tensor(0.0)


def program(group):
    tokens = [torch.tensor([5, 0, 7]), torch.tensor([])][dist.get_rank()]
    total = count(tokens)
    dist.all_reduce(total)  # named: ranks 0-1
    return total
