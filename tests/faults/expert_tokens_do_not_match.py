"""Expert parallelism: each rank assumes that the others send it as many tokens as it sends them."""

import torch
import torch.distributed as dist

KIND = "splits"
RANKS = 4
SAYS = ("all_to_all", "was sent", "is received", "rank 0", "rank 1")
REAL = True


def program(group):
    rank = dist.get_rank()
    sent = [[1, 3, 0, 0], [2, 2, 0, 0], [0, 0, 2, 2], [0, 0, 2, 2]][rank]
    tokens = torch.full((4, 8), float(rank))
    received = torch.empty(sum(sent), 8)
    dist.all_to_all_single(received, tokens, output_split_sizes=sent, input_split_sizes=sent)  # named: ranks 0-3
    return received
