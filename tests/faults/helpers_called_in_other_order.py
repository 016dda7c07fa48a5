"""Loss and accuracy are reduced by two helpers, which rank 1 starts in the other order."""

import torch
import torch.distributed as dist

KIND = "order"
RANKS = 3
SAYS = "collectives in different order on different ranks"
REAL = True


def start_loss(metrics):
    return dist.all_reduce(metrics["loss"], async_op=True)  # named: ranks 0-2


def start_accuracy(metrics):
    return dist.all_reduce(metrics["accuracy"], async_op=True)  # named: ranks 0-2


def program(group):
    metrics = {"loss": torch.ones(1), "accuracy": torch.ones(1)}
    helpers = [start_loss, start_accuracy]
    if dist.get_rank() == 1:
        helpers.reverse()
    for work in [start(metrics) for start in helpers]:
        work.wait()
    return metrics
