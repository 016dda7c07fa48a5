"""Which rank computes what: tensor-parallel groups of neighbouring ranks, and data parallelism across the groups."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from src import Group
from src.distributed import all_reduce
from src.distributed.failure import same_timeout
from src.modeling import Transformer
from src.training import Batch

# Ranks draw the same weights by themselves, and buffers on the CPU could not be sent over NCCL.
# torch 2.13 renamed the second option and warns at the old name.
_NEW = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_SEND_NOTHING: dict[str, Any] = {"init_sync": False, "forward_sync_buffers" if _NEW else "broadcast_buffers": False}


@dataclass(frozen=True)
class Mesh:
    """All ranks (``world``) as dp x tp: the groups of this rank, and for dp > 1 the axis of a DeviceMesh."""

    world: Group
    tp: Group
    dp: Group
    axis: DeviceMesh | None

    @classmethod
    def arrange(cls, world: Group, dp: int, batch_size: int, device: torch.device) -> Mesh:
        """``dp`` times as many ranks as a tensor-parallel group has.

        Raises ValueError when ``dp`` does not divide the number of ranks or the batch.
        """
        if dp == 1:
            return cls(world, world, Group.single(), None)
        if world.world_size % dp:
            raise ValueError(
                f"--dp {dp} does not divide the number of ranks, {world.world_size}; start a multiple of {dp}"
            )
        if batch_size % dp:
            raise ValueError(f"--batch-size {batch_size} cannot be split over --dp {dp}; choose a multiple of {dp}")
        mesh = init_device_mesh(device.type, (dp, world.world_size // dp), mesh_dim_names=("dp", "tp"))
        tp, data_parallel = Group(mesh["tp"]), Group(mesh["dp"])
        same_timeout(world, [tp, data_parallel])
        return cls(world, tp, data_parallel, mesh["dp"])

    def wrap(self, model: Transformer, mode: str) -> nn.Module:
        """``model`` as it is to be called in training; ``mode`` is "ddp" or "fsdp", which cuts it in place."""
        if self.axis is None:
            return model
        if mode == "ddp":
            return DistributedDataParallel(model, process_group=self.dp.pg, **_SEND_NOTHING)
        for layer in model.layers:
            fully_shard(layer, mesh=self.axis)
        fully_shard(model, mesh=self.axis)
        return model

    def share(self, batch: Batch) -> Batch:
        """This rank's sequences of a batch."""
        ids, targets = (side.chunk(self.dp.world_size)[self.dp.rank] for side in batch)
        return ids, targets

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the data-parallel ranks."""
        return all_reduce(value, group=self.dp) / self.dp.world_size
