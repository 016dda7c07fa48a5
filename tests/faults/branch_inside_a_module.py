"""An MLP, deep inside the model, that skips its all-reduce where all of its activations are zero."""

import torch
import torch.distributed as dist
from torch import nn

KIND = "branch"
RANKS = 4
SAYS = ("different shapes", "rank 3: all_reduce(SUM, float32[])")
MODULE = "layers.1.mlp"
REAL = True


class RowParallel(nn.Module):
    def forward(self, x):
        if x.any():
            dist.all_reduce(x)  # named: ranks 0-2, forward
        return x


class Layer(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.mlp = scale, RowParallel()

    def forward(self, x):
        return x + self.mlp((x * self.scale).relu())


def program(group):
    model = nn.Module()
    model.layers = nn.Sequential(Layer(1.0), Layer(-1.0 if dist.get_rank() == 3 else 1.0))
    model.forward = lambda x: model.layers(x)
    loss = model(torch.ones(2, 4)).sum()
    dist.all_reduce(loss)  # named: rank 3
    return loss
