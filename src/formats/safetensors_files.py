"""Slices of tensors that lie in one safetensors file or in many with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .directory import read_json
from .slices import LocalSlice

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def safetensors() -> Any:
    """The library. Raises ImportError that names the extra."""
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("safetensors is not installed; pip install -e '.[hf]'") from None
    return safetensors


class SafetensorsFiles:
    """The tensors of a directory by name; files are opened when first asked for.

    Raises ValueError for a directory without weights, and for an index that names files that are not there.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._open = path, safetensors().safe_open
        self._handles: dict[str, Any] = {}
        if (path / INDEX).exists():
            self._homes: dict[str, str] = read_json(path / INDEX)["weight_map"]
            missing = sorted({file for file in self._homes.values() if not (path / file).exists()})
            if missing:
                raise ValueError(f"{path / INDEX} names files that are not there: {', '.join(missing)}")
        elif (path / WEIGHTS).exists():
            self._homes = dict.fromkeys(self._handle(WEIGHTS).keys(), WEIGHTS)
        else:
            raise ValueError(f"{path} holds neither {WEIGHTS} nor {INDEX}")

    def names(self) -> set[str]:
        """All tensors."""
        return set(self._homes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a whole tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, item: LocalSlice) -> Tensor:
        """The part of tensor ``name`` that ``item`` holds; nothing else is read."""
        piece: Tensor = self._slice(name)[item.index]
        return piece

    def _slice(self, name: str) -> Any:
        return self._handle(self._homes[name]).get_slice(name)

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = self._open(self.path / file, "pt")
            except Exception as error:
                raise ValueError(f"cannot read {self.path / file}: {error}") from None
        return self._handles[file]


def save_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, marked as transformers expects it."""
    safetensors().torch.save_file(dict(tensors), path, metadata={"format": "pt"})


def file_names(sizes: Mapping[str, int], max_file_size: int) -> dict[str, list[str]]:
    """File names to the tensors of each, in the given order; a file exceeds ``max_file_size`` only by one tensor.

    Raises ValueError for a size that is none.
    """
    if max_file_size < 1:
        raise ValueError(f"max_file_size={max_file_size} must be at least 1 byte")
    runs: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not runs or filled + size > max_file_size:
            runs.append([])
            filled = 0
        runs[-1].append(name)
        filled += size
    if len(runs) == 1:
        return {WEIGHTS: runs[0]}
    return {f"model-{i:05d}-of-{len(runs):05d}.safetensors": run for i, run in enumerate(runs, 1)}
