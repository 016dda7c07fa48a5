"""A hand-written autograd function whose backward uses another collective on the last rank."""

import torch
import torch.distributed as dist

KIND = "op"
RANKS = 2
SAYS = "different operations"
REAL = True


class SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        if dist.get_rank() == dist.get_world_size() - 1:
            dist.reduce(total, dst=1)  # named: rank 1, backward
        else:
            dist.all_reduce(total)  # named: rank 0, backward
        return total


def program(group):
    x = torch.ones(3, requires_grad=True)
    SumGradients.apply(x).prod().backward()
    return x.grad
