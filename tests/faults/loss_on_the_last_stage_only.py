"""The vocabulary-parallel loss is taken on rank 1 alone, as if it were the last pipeline stage."""

import torch
import torch.distributed as dist

from src.modeling import vocab_parallel_cross_entropy

KIND = "branch"
RANKS = 2
SAYS = ("rank 0 has already returned", "lacks rank 0")
SAYS_REAL = "rank 0 did not come to all_gather"
REAL = True


def program(group):
    logits = torch.randn(3, 4, requires_grad=True)
    if dist.get_rank() < dist.get_world_size() - 1:
        return None
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([0, 5, 7]), group=group)  # named: rank 1, forward
    loss.mean().backward()
    return logits.grad
