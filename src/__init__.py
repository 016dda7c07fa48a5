"""isoshard: tensor parallelism that gives the same bits at every size."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distributed import Group, Ledger, SimulationError, close, init, simulate
    from .functional import apply_rotary_pos_emb
    from .modeling import GroupRMSNorm, NTKAwareRoPE, ParallelVocabEmbedding, VocabEmbedding
    from .tensor_parallel import Heads, llama_plan, parallelize

__version__ = "0.1.0"
__all__ = [
    "Group",
    "GroupRMSNorm",
    "Heads",
    "Ledger",
    "NTKAwareRoPE",
    "ParallelVocabEmbedding",
    "SimulationError",
    "VocabEmbedding",
    "apply_rotary_pos_emb",
    "close",
    "init",
    "llama_plan",
    "parallelize",
    "simulate",
]
_HOMES = ("distributed", "functional", "modeling", "tensor_parallel")


def __getattr__(name: str) -> Any:
    # torch is imported on first use: pytest loads the plugin at every start, wherever this package is installed.
    if name in _HOMES:
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        homes = (importlib.import_module(f".{home}", __name__) for home in _HOMES)
        return next(getattr(home, name) for home in homes if hasattr(home, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES})
