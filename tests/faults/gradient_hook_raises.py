"""Rank 3 checks its gradients in a hook, finds NaN, and raises in the middle of everybody's backward."""

import torch
import torch.distributed as dist

from src.distributed import copy_to_region

KIND = "exception"
RANKS = 5
SAYS = ("rank 3 raised FloatingPointError: NaN in the gradient", "waits in all_reduce(SUM, float32[2]) backward")
REAL = True
ORDER = "who waits already when rank 3 raises"


def stop_at_nan(gradient):
    if gradient.isnan().any():
        raise FloatingPointError("NaN in the gradient")  # named: rank 3


def program(group):
    x = torch.ones(2, requires_grad=True)
    y = copy_to_region(x, group=group) * torch.tensor([1.0, 2.0])
    y.register_hook(stop_at_nan)
    loss = y.sum() * (float("nan") if dist.get_rank() == 3 else 1.0)
    loss.backward()  # named: ranks 0-2, backward
    return x.grad
