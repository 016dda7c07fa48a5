"""Comparing runs bit by bit: digests of unsharded tensors, and guards for what the promise rests on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed.group import Group
from .distributed.runtime import cublas_workspace
from .modeling.parameters import local_part, placements


def each_unsharded_weight(model: nn.Module, *, group: Group) -> Iterator[tuple[str, Tensor]]:
    """Names and whole parameters, without padding or replicas, one at a time. Called by all ranks."""
    for place in placements(model, group=group):
        yield place.name, place.whole(place.parameter.detach(), group)


def unsharded_weights(model: nn.Module, *, group: Group) -> dict[str, Tensor]:
    """Every parameter whole, on every rank, all at once. Called by all ranks."""
    return dict(each_unsharded_weight(model, group=group))


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


def audit_gradients(model: nn.Module, *, group: Group) -> list[str]:
    """One sentence for each parameter, or gradient, of which ranks that must hold it alike do not; called by all ranks.

    Replicated parameters, and shared kv heads on the ranks that share them, must be equal bit for bit after every
    backward pass. Where a gradient is not, a reduction was forgotten: ``copy_to_region`` on the way into sharded
    computation, or the sum of norm gradients over the sequence under sequence parallelism.
    """
    own = [
        (
            place.name,
            what,
            0 if place.dim is None else place.offset(group),
            None if value is None else digest({"": local_part(value).tensor}),
        )
        for place in placements(model, group=group)
        if place.dim is None or place.replicas > 1
        for what, value in (("value", place.parameter), ("gradient", place.parameter.grad))
    ]
    findings = []
    for reports in zip(*_from_everyone(own, group), strict=True):
        holders: dict[int, dict[str | None, list[int]]] = {}
        for rank, (_, _, offset, content) in enumerate(reports):
            holders.setdefault(offset, {}).setdefault(content, []).append(rank)
        name, what, *_ = reports[0]
        for versions in holders.values():
            if len(versions) > 1:
                findings.append(f"{what} of {name} differs between ranks {' and '.join(map(str, versions.values()))}")
    return findings


def check_promise(group: Group, device: torch.device) -> None:
    """Raise ValueError where a setting would break the promise of same bits, naming setting, values and ranks.

    Ranks must agree on the intra-op thread count, on torch and on the instruction set of the CPU; on CUDA also on the
    kind of GPU, and nondeterministic kernels must be ruled out. Called by all ranks.
    """
    check_agreement(_settings(device), group)
    if device.type == "cuda":
        _check_cuda()


def check_agreement(own: dict[str, Any], group: Group) -> None:
    """Raise ValueError where an entry of ``own`` differs between ranks, naming it. Called by all ranks."""
    everyone = _from_everyone(own, group)
    for name in own:
        values = [settings[name] for settings in everyone]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"ranks need the same {name}, but it is {values[0]!r} on rank 0 and {values[other]!r} on rank {other}"
            )


def _from_everyone(own: Any, group: Group) -> list[Any]:
    everyone = [own] * group.world_size
    if group.world_size > 1:
        dist.all_gather_object(everyone, own, group=group.pg)
    return everyone


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
