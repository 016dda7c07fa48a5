"""Packages that only some of the scripts need."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(name: str, extra: str) -> Any:
    """The module ``name``. Raises ImportError that says which ``extra`` of this package brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name.split('.')[0]} is not installed; pip install -e '.[{extra}]'") from error
