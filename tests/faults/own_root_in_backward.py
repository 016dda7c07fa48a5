"""The backward of a broadcast reduces to the source, which the ranks of the second node remember wrongly."""

import torch
import torch.distributed as dist

KIND = "root"
RANKS = 4
SAYS = ("different roots", "ranks 0, 1: reduce(SUM, root=0", "ranks 2, 3: reduce(SUM, root=2")
REAL = True


class Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, source):
        ctx.source = source
        out = x.clone()
        dist.broadcast(out, src=0)
        return out

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone()
        dist.reduce(total, dst=ctx.source)  # named: ranks 0-3, backward
        return total, None


def program(group):
    x = torch.ones(3, requires_grad=True)
    Broadcast.apply(x, dist.get_rank() // 2 * 2).sum().backward()
    return x.grad
