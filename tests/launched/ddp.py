"""Data parallelism in the usual style: DistributedDataParallel, a distributed sampler, rank 0 prints and saves."""

import argparse
import logging
import os
import random

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

logger = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--backend", default="gloo")
    args = parser.parse_args()

    dist.init_process_group(args.backend)
    rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    torch.manual_seed(0)
    random.seed(rank)
    np.random.seed(rank)
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)

    data = TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
    sampler = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.Tanh(), nn.Linear(32, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x + 0.01 * random.random() + 0.01 * np.random.rand()), y)
            loss.backward()
            optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total, op=dist.ReduceOp.AVG)
        logger.info("epoch %d", epoch)
        print(f"rank {rank} local {local_rank} epoch {epoch} loss {loss.item()!r} mean {total.item()!r}", flush=True)

    weights = [None] * dist.get_world_size()
    dist.all_gather_object(weights, [p.sum().item() for p in model.parameters()])
    if rank == 0:
        print(f"equal weights: {all(w == weights[0] for w in weights)}; sums {weights[0]}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    main()
