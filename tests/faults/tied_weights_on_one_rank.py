"""The weights of rank 0 are tied, so it broadcasts one parameter fewer than the others await."""

import torch.distributed as dist
from torch import nn

KIND = "shape"
RANKS = 2
SAYS = ("different shapes", "rank 0: broadcast(root=0, float32[6])", "rank 1: broadcast(root=0, float32[6, 4])")
REAL = True


def program(group):
    model = nn.Sequential()
    model.embedding, model.head = nn.Embedding(6, 4), nn.Linear(4, 6)
    if dist.get_rank() == 0:
        model.head.weight = model.embedding.weight
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)  # named: ranks 0-1
    return model
