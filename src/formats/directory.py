"""Directories that appear when they are complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..distributed import Group, barrier, long_wait

PATIENCE = 3600.0
"""Seconds that rank 0 may take for its files while the others wait."""


@contextmanager
def new_directory(path: str | Path, group: Group) -> Iterator[Path]:
    """A directory beside ``path`` to write into, which takes its name at the end. Entered by all ranks.

    Raises ValueError where ``path`` exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists; choose another path, or remove it first")
    building = path.with_name(path.name + ".building")
    with long_wait(group, PATIENCE):
        barrier(group)
        if group.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
            _make(building, path)
        yield building
        if group.rank == 0:
            building.rename(path)
        barrier(group)


def _make(building: Path, path: Path) -> None:
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"cannot make {path}: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file ``path``. Raises ValueError, naming it, when there is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` for people to read, too."""
    path.write_text(json.dumps(content, indent=2) + "\n")
