"""The vocabulary of 10 rows is scattered over four ranks, whose pieces are of different sizes on the root."""

import torch
import torch.distributed as dist

KIND = "splits"
RANKS = 4
SAYS = ("scatter", "rank 3", "[1, 2]", "[3, 2]")
REAL = True


def program(group):
    piece = torch.empty(3, 2)
    pieces = list(torch.ones(10, 2).chunk(4)) if dist.get_rank() == 0 else None
    dist.scatter(piece, pieces, src=0)  # named: ranks 0-3
    return piece
