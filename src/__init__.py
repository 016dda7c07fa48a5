"""isoshard: tensor parallelism that gives the same bits at every size."""

from .distributed import Group, Ledger, SimulationError, close, init, simulate
from .functional import apply_rotary_pos_emb
from .modeling import GroupRMSNorm, NTKAwareRoPE, ParallelVocabEmbedding, VocabEmbedding

__version__ = "0.1.0"
__all__ = [
    "Group",
    "GroupRMSNorm",
    "Ledger",
    "NTKAwareRoPE",
    "ParallelVocabEmbedding",
    "SimulationError",
    "VocabEmbedding",
    "apply_rotary_pos_emb",
    "close",
    "init",
    "simulate",
]
