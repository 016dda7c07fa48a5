"""From torchrun's environment to a Group and a device. The only file of the library that reads the environment."""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from .group import Group, ReduceOrder
from .lockstep import RankThread


def init(
    *,
    device: str | torch.device | None = None,
    backend: str | None = None,
    num_shards: int | None = None,
    reduce_order: ReduceOrder = "backend",
    timeout: timedelta | None = None,
) -> Group:
    """The Group of this process: over the default group where there is one, else over the one torchrun describes.

    Started by neither torchrun nor ``simulate`` it is a world of one. ``backend`` defaults to nccl on GPUs and
    gloo elsewhere.

    Raises ValueError when WORLD_SIZE is above 1 and RANK is unset.
    """
    if not dist.is_initialized():
        if "RANK" in os.environ:
            place = local_device(device)
            if place.type == "cuda":
                torch.cuda.set_device(place)
            dist.init_process_group(backend or ("nccl" if place.type == "cuda" else "gloo"), timeout=timeout)
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} but RANK is not set; start the program with torchrun"
            )
    return Group(num_shards=num_shards, reduce_order=reduce_order)


def local_device(device: str | torch.device | None = None) -> torch.device:
    """``device``, or this rank's GPU (``cuda:LOCAL_RANK``) where every rank of the machine has one, or the CPU.

    Raises ValueError for a device that is unknown, and for CUDA with fewer GPUs than ranks.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank, ranks_here = (int(os.environ.get(n, d)) for n, d in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    if device is None:
        device = "cuda" if gpus >= ranks_here else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is none that torch knows ({str(error).splitlines()[0]})") from None
    if place.type != "cuda":
        return place
    if gpus < ranks_here:
        raise ValueError(f"device={device}: {ranks_here} ranks on this machine need as many GPUs, found {gpus}")
    return place if place.index is not None else torch.device("cuda", local_rank)


def close() -> None:
    """Wait for all ranks, then leave the default group, if there is one; ``simulate`` ends its own by itself."""
    if dist.is_initialized():
        dist.barrier()
        if not isinstance(threading.current_thread(), RankThread):
            dist.destroy_process_group()


def cublas_workspace() -> str | None:
    """The setting on which cuBLAS's determinism rests."""
    return os.environ.get("CUBLAS_WORKSPACE_CONFIG")
