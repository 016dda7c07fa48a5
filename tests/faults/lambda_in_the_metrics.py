"""One rank puts a lambda among the metrics that all_gather_object has to pickle."""

import torch.distributed as dist

KIND = "exception"
RANKS = 4
SAYS = "rank 2 raised "
SAYS_REAL = "rank 2 did not come to all_gather"
REAL = True
ORDER = "who waits already when rank 2 raises"


def program(group):
    metrics = {"loss": 0.5, "accuracy": 0.9}
    if dist.get_rank() == 2:
        metrics["format"] = lambda value: f"{value:.2f}"
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, metrics)  # named: rank 2, simulated
    return len(everything)
