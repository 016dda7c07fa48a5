"""Comparing runs bit by bit: digests of unsharded tensors, and guards for what the promise rests on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed.group import Group
from .distributed.runtime import cublas_workspace
from .modeling.parameters import placements


def unsharded_weights(model: nn.Module, *, group: Group) -> dict[str, Tensor]:
    """Every parameter whole, without padding or replicas, on every rank. Called by all ranks."""
    return {place.name: place.whole(place.parameter.detach(), group) for place in placements(model, group=group)}


def unsharded_gradients(model: nn.Module, *, group: Group) -> dict[str, Tensor]:
    """Every gradient whole, without padding or replicas, on every rank; parameters without one are left out."""
    return {
        place.name: place.whole(place.parameter.grad, group)
        for place in placements(model, group=group)
        if place.parameter.grad is not None
    }


def digest(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the given order; -0.0 counts as 0.0, as in ``torch.equal``."""
    state = hashlib.sha256()
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        value = (tensor.detach().cpu() + 0).contiguous()
        state.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        state.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def first_difference(name: str, want: Tensor, got: Tensor) -> str | None:
    """Where and by how much ``got`` first differs from ``want``; None where the two are equal."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{name}: {got.dtype} {list(got.shape)} instead of {want.dtype} {list(want.shape)}"
    different = (want != got) & ~(want.isnan() & got.isnan())
    if not different.any():
        return None
    at = tuple(different.nonzero()[0].tolist())
    a, b = want[at].item(), got[at].item()
    count = int(different.sum())
    return f"{name}{list(at)} is {b!r} instead of {a!r}, off by {abs(a - b):.3g} ({count} of {want.numel()} differ)"


def check_promise(group: Group, device: torch.device) -> None:
    """Raise ValueError where a setting would break the promise of same bits, naming setting, values and ranks.

    Ranks must agree on the intra-op thread count, on torch and on the instruction set of the CPU; on CUDA also on the
    kind of GPU, and nondeterministic kernels must be ruled out. Called by all ranks.
    """
    own = _settings(device)
    everyone: list[dict[str, Any]] = [own] * group.world_size
    if group.world_size > 1:
        dist.all_gather_object(everyone, own, group=group.pg)
    for name in own:
        values = [settings[name] for settings in everyone]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"same bits need the same {name} on every rank, "
                f"but it is {values[0]!r} on rank 0 and {values[other]!r} on rank {other}"
            )
    if device.type == "cuda":
        _check_cuda()


def _settings(device: torch.device) -> dict[str, Any]:
    settings = {
        "number of intra-op threads (OMP_NUM_THREADS)": torch.get_num_threads(),
        "version of torch": torch.__version__,
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "kind of device": device.type,
    }
    if device.type == "cuda":
        settings["kind of GPU"] = torch.cuda.get_device_name(device)
    return settings


def _check_cuda() -> None:
    if not torch.are_deterministic_algorithms_enabled():
        raise ValueError("same bits on CUDA need torch.use_deterministic_algorithms(True)")
    if torch.backends.cudnn.benchmark:
        raise ValueError("same bits on CUDA need torch.backends.cudnn.benchmark = False")
    if cublas_workspace() not in (":4096:8", ":16:8"):
        raise ValueError("same bits on CUDA need CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment")
