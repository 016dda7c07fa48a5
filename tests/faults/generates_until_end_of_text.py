"""Tensor-parallel generation in which each rank samples for itself, so that one ends its text earlier."""

import torch
import torch.distributed as dist

KIND = "loop length"
RANKS = 8
SAYS = ("rank 6 has already returned", "rank 6 returned after all_reduce")
REAL = True

END = 0


def program(group):
    generator = torch.Generator().manual_seed(int(dist.get_rank() == 6))
    text = []
    for _ in range(12):
        logits = torch.ones(3)
        dist.all_reduce(logits)  # named: ranks 0-5, 7
        token = int(torch.multinomial(logits.softmax(0), 1, generator=generator))
        if token == END:
            break
        text.append(token)
    return text
