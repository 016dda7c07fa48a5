"""The layers, one file each, and the model they make."""

from ..functional import precompute_freqs_cis
from .attention import Attention
from .block import TransformerBlock
from .config import ModelArgs
from .dropout import ParallelDropout
from .kv_linear import KVParallelLinear
from .linear import ColumnParallelLinear, RowParallelLinear
from .linear_loss import vocab_parallel_linear_cross_entropy
from .lm_head import LMHead
from .loss import vocab_parallel_cross_entropy
from .mlp import FeedForward
from .norm import GroupRMSNorm, RMSNorm
from .pos_emb import NTKAwareRoPE, RotaryFrequencies
from .transformer import Transformer
from .vocab_emb import ParallelVocabEmbedding, VocabEmbedding

__all__ = [
    "Attention",
    "ColumnParallelLinear",
    "FeedForward",
    "GroupRMSNorm",
    "KVParallelLinear",
    "LMHead",
    "ModelArgs",
    "NTKAwareRoPE",
    "ParallelDropout",
    "ParallelVocabEmbedding",
    "RMSNorm",
    "RotaryFrequencies",
    "RowParallelLinear",
    "Transformer",
    "TransformerBlock",
    "VocabEmbedding",
    "precompute_freqs_cis",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
