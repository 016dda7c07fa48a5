"""The shape of a Llama-style model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..rope_scaling import RopeScaling


@dataclass
class ModelArgs:
    """Llama 3's names and defaults, and our own after ``max_seq_len``.

    ``n_kv_heads`` None means ``n_heads``; ``vocab_size`` must be set before a model is built. ``pad_vocab`` pads a
    vocabulary that the logical shards do not divide; ``tie_embeddings`` lets the head share the embedding's table;
    ``dropout`` acts on the heads' outputs, the feed-forward's hidden features, and what both add to the residual.
    ``head_dim`` 0 means ``dim / n_heads``; ``ffn_dim`` is the feed-forward's size as it is, None leaves it to Llama's
    rule. ``rope_pairing`` says which channels of a head are rotated together: Llama's neighbours ``(2i, 2i + 1)``, or
    halves ``(i, i + head_dim / 2)`` as in Hugging Face's checkpoints; ``rope_scaling`` by which rule the frequencies
    are stretched (a RopeScaling, or its fields as a mapping).

    Raises ValueError for sizes that do not fit each other.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000
    max_batch_size: int = 32
    max_seq_len: int = 2048
    pad_vocab: bool = False
    tie_embeddings: bool = False
    dropout: float = 0.0
    head_dim: int = 0
    ffn_dim: int | None = None
    rope_pairing: Literal["neighbours", "halves"] = "neighbours"
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):
            self.rope_scaling = RopeScaling(**self.rope_scaling)
        if self.rope_pairing not in ("neighbours", "halves"):
            raise ValueError(f'rope_pairing={self.rope_pairing!r} is not "neighbours" or "halves"')
        for name in ("dim", "n_layers", "n_heads", "kv_heads", "multiple_of", "max_batch_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('kv_heads', 'n_kv_heads')}={getattr(self, name)} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if not self.head_dim:
            if self.dim % self.n_heads:
                raise ValueError(f"n_heads={self.n_heads} must divide dim={self.dim}; or set head_dim")
            self.head_dim = self.dim // self.n_heads
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} (dim={self.dim} / n_heads={self.n_heads}) must be even for rotary embeddings"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_kv_heads={self.kv_heads} must divide n_heads={self.n_heads}")

    @property
    def kv_heads(self) -> int:
        """Key and value heads, ``n_heads`` unless fewer are asked for."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads
