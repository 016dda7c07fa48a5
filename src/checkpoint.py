"""Sharded checkpoints in the format of ``torch.distributed.checkpoint``, written whole or not at all.

Each rank writes its slices with their place in the full tensor, without padding; any world size can read them back.
A checkpoint is a directory: torch's files, and ``isoshard.json`` with the program's own data and the size of each
file, by which a truncated checkpoint is known.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from .distributed import Group, barrier, long_wait
from .modeling.parameters import Placement, local_part, placements, plain_name, unwrapped

INFO = "isoshard.json"

Report = Callable[[str, int], None]
"""Told the name and the bytes of each tensor that this rank has read or written."""

PATIENCE = 3600.0
"""Seconds that a rank may take for its files while the others wait."""


class ShardView(torch.Tensor):
    """A sharded tensor as ``torch.distributed.checkpoint`` asks for it: whole in size, holding this process's slice.

    Shares the slice's storage, so that loading fills it in place. It can be saved and loaded, not computed with.
    """

    _local: Tensor
    _offsets: torch.Size

    @staticmethod
    def __new__(cls, tensor: Tensor, place: Placement, group: Group) -> ShardView:
        part, dim, sizes, offsets = local_part(tensor), place.dim or 0, list(tensor.shape), [0] * tensor.dim()
        sizes[dim], offsets[dim] = place.size, place.offset(group)
        view: ShardView = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(sizes), dtype=tensor.dtype, device=part.tensor.device
        )
        view._local = part.within(dim, 0, place.size - offsets[dim])
        view._offsets = torch.Size(outer + inner for outer, inner in zip(offsets, part.offsets, strict=True))
        return view

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> NoReturn:
        raise TypeError(f"{func}: a ShardView is for torch.distributed.checkpoint only; use the parameter itself")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        chunk = ChunkStorageMetadata(offsets=self._offsets, sizes=self._local.shape)
        return [chunk] if self._local.numel() else []

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self._local


def sharded_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, group: Group
) -> dict[str, Any]:
    """Names to this rank's slices (``ShardView``) and replicated tensors: what ``dcp.save`` and ``dcp.load`` take.

    Parameters and persistent buffers appear as ``model.<name>``, tied ones once; optimizer state as
    ``optimizer.<name>.<key>``. The names are those of the model without wrappers. Where ``fully_shard`` has cut the
    model, slices are cut once more, and what is replicated is a DTensor.
    """
    model = unwrapped(model)
    kept = {plain_name(name) for name in model.state_dict()}
    buffers = {plain_name(name): buffer for name, buffer in model.named_buffers()}
    state: dict[str, Any] = {f"model.{name}": buffer for name, buffer in buffers.items() if name in kept}
    for place in placements(model, group=group):
        state[f"model.{place.name}"] = _view(place.parameter.detach(), place, group)
        for key, value in (optimizer.state.get(place.parameter, {}) if optimizer else {}).items():
            state[f"optimizer.{place.name}.{key}"] = _view(value, place, group)
    return state


def save(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    info: dict[str, Any] | None = None,
    *,
    group: Group,
    world: Group | None = None,
    report: Report | None = None,
) -> None:
    """Write a checkpoint directory ``path``, replacing an older one; ``info`` is data of the program's own, for JSON.

    Everything is written into a directory beside it, which takes the name when all ranks have finished: a checkpoint
    that can be seen is whole. ``group`` is the tensor-parallel group of the model, ``world`` all ranks that hold the
    model or parts of it (default: ``group``); what several of them hold alike is written once. Called by all of them.

    Raises ValueError when the job has more ranks than ``group`` and ``world`` is not given.
    """
    path = Path(path)
    building, old = path.with_name(path.name + ".building"), path.with_name(path.name + ".old")
    world = _everyone(group) if world is None else world
    if world.rank == 0:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    with _file_work(world):
        barrier(world)
        state = sharded_state_dict(model, optimizer, group=group)
        dcp_save(state, storage_writer=FileSystemWriter(building), planner=_SavePlanner(report), **_where(world))
        if world.rank == 0:
            sizes = {file.name: file.stat().st_size for file in sorted(building.iterdir())}
            record = {"info": info or {}, "optimizer": optimizer is not None, "files": sizes}
            (building / INFO).write_text(json.dumps(record, indent=1))
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            building.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        barrier(world)


def _everyone(group: Group) -> Group:
    """``group``, unless other ranks may hold the model too: two writers would spoil each other's files."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks > group.world_size:
        raise ValueError(
            f"group has world_size={group.world_size} of the {ranks} ranks of this job; pass world=, the Group of all "
            "ranks that hold the model, or world=group if no others do"
        )
    return group


def read_info(path: str | Path) -> dict[str, Any]:
    """The ``info`` that was saved with the checkpoint at ``path``.

    Raises ValueError when there is no checkpoint there, or an incomplete one.
    """
    info: dict[str, Any] = _read_record(_find(path))["info"]
    return info


def _find(path: str | Path) -> Path:
    """``path``, or what it replaced when a save was ended between moving the old one away and the new one in."""
    path = Path(path)
    old = path.with_name(path.name + ".old")
    return old if old.exists() and not path.exists() else path


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((path / INFO).read_text())
        files = record["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a checkpoint of isoshard: cannot read {INFO} ({error})") from None
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).exists() else 0
        if found != size:
            raise ValueError(f"checkpoint {path} is damaged: {name} has {found} bytes of {size}")
    return record


def load(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    group: Group,
    world: Group | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Fill ``model`` and ``optimizer`` in place from the checkpoint at ``path``; return its ``info``.

    The checkpoint may come from any number of ranks, tensor-parallel and data-parallel. Called by all ranks of
    ``world``, which is as for ``save``: an error is raised on all of them.

    Raises ValueError when the checkpoint is missing, incomplete, without optimizer state where that is asked for, or of
    another model; then nothing has been changed. Files are known by their sizes: ValueError, too, where torch finds one
    unreadable; a changed byte inside a tensor is not found.
    """
    path = _find(path)
    record = _read_record(path)
    if optimizer is not None and not record["optimizer"]:
        raise ValueError(f"checkpoint {path} holds no optimizer state; pass optimizer=None to load the model alone")
    reader = FileSystemReader(path)
    try:
        metadata = reader.read_metadata()
        _check_model(path, sharded_state_dict(model, group=group), metadata)
        if optimizer is not None:
            _allocate_state(model, optimizer, metadata, group)
        state = sharded_state_dict(model, optimizer, group=group)
        with _file_work(world or group):
            dcp_load(state, storage_reader=reader, planner=_LoadPlanner(report), **_where(world or group))
    except (CheckpointException, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {str(error).splitlines()[-1]}") from error
    info: dict[str, Any] = record["info"]
    return info


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, report: Report | None) -> None:
        super().__init__()
        self._report = report

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        data: Tensor | io.BytesIO = super().resolve_data(write_item)
        if self._report is not None and isinstance(data, Tensor):
            self._report(write_item.index.fqn, data.nbytes)
        return data


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, report: Report | None) -> None:
        super().__init__()
        self._report = report

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        if self._report is not None:
            self._report(read_item.dest_index.fqn, tensor.nbytes)


def _where(group: Group) -> dict[str, Any]:
    return {"no_dist": True} if group.world_size == 1 else {"process_group": group.pg}


@contextmanager
def _file_work(group: Group) -> Iterator[None]:
    """Ranks may wait for each other's files, and a single process is not warned that it is one."""
    with warnings.catch_warnings(), long_wait(group, PATIENCE):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _view(value: Any, place: Placement, group: Group) -> Any:
    """Whatever has the parameter's shape is sharded like it; scalars (a step count) are replicated."""
    if place.dim is None or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.shape != place.parameter.shape:
        raise ValueError(
            f"optimizer state of {place.name} is {list(value.shape)}, neither a scalar nor of the shape "
            f"{list(place.parameter.shape)} of this rank's slice: how it is sharded is not known"
        )
    return ShardView(value, place, group)


def _check_model(path: str | Path, state: dict[str, Any], metadata: Metadata) -> None:
    saved = {name: entry for name, entry in metadata.state_dict_metadata.items() if name.startswith("model.")}
    for name in sorted(state.keys() | saved.keys()):
        if name not in saved:
            raise ValueError(f"checkpoint {path} is of another model: it has no {name}")
        if name not in state:
            raise ValueError(f"checkpoint {path} is of another model: this one has no {name}")
        entry = saved[name]
        size = list(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        if size != list(state[name].size()):
            raise ValueError(
                f"checkpoint {path} is of another model: {name} is {size} there and {list(state[name].size())} here"
            )


def _allocate_state(model: nn.Module, optimizer: torch.optim.Optimizer, metadata: Metadata, group: Group) -> None:
    """Give the optimizer empty state of the kind that was saved."""
    for place in placements(model, group=group):
        prefix = f"optimizer.{place.name}."
        whole = metadata.state_dict_metadata[f"model.{place.name}"]
        for name, entry in metadata.state_dict_metadata.items():
            if not name.startswith(prefix) or not isinstance(entry, TensorStorageMetadata):
                continue
            like_parameter = isinstance(whole, TensorStorageMetadata) and entry.size == whole.size and entry.size
            like = place.parameter.detach() if like_parameter else torch.empty(entry.size)
            value = torch.zeros_like(like, dtype=entry.properties.dtype)
            optimizer.state[place.parameter][name.removeprefix(prefix)] = value
