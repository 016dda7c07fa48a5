"""Contrastive loss: rank 1 gathers with gradients, whose backward is a collective; rank 0 gathers without."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as with_gradient

KIND = "branch"
RANKS = 2
SAYS = ("rank 0 has already returned", "lacks rank 0")
SAYS_REAL = "rank 0 did not come to"
REAL = True


def gather(features):
    if dist.get_rank() == 1:
        return torch.cat(with_gradient.all_gather(features, group=dist.group.WORLD))
    parts = [torch.empty_like(features) for _ in range(2)]
    dist.all_gather(parts, features.detach())
    parts[dist.get_rank()] = features
    return torch.cat(parts)


def program(group):
    images = torch.ones(2, 3, requires_grad=True)
    loss = (images @ gather(images).T).logsumexp(1).sum()
    loss.backward()  # named: rank 1, backward
    return images.grad
