"""Tensor parallelism with torch's own DTensor: a mesh, parallelize_module, a sharded state."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WORLD_SIZE = int(os.environ["WORLD_SIZE"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


mesh = init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("tp",))
torch.manual_seed(0)
model = nn.Sequential(Block(), Block())
plan = {
    f"{i}.{name}": style for i in range(2) for name, style in (("up", ColwiseParallel()), ("down", RowwiseParallel()))
}
parallelize_module(model, mesh["tp"], plan)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)

x = torch.randn(4, 16)
for step in range(3):
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"rank {mesh.get_local_rank('tp')} step {step} loss {loss.item()!r}")

table = distribute_tensor(torch.arange(32.0).view(8, 4), mesh, [Shard(0)])
print(
    f"local {list(table.to_local().shape)} full sum {table.full_tensor().sum().item()} {model[0].up.weight.placements}"
)
dist.barrier()
dist.destroy_process_group()
