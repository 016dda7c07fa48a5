"""One pre-norm transformer block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.group import group_or_single
from ..distributed.random import SEED_STRIDE
from ..functional import Rotation
from .attention import Attention, Mask
from .config import ModelArgs
from .dropout import ParallelDropout
from .mlp import FeedForward
from .norm import RMSNorm

SEEDS_PER_BLOCK = 16 * SEED_STRIDE


class TransformerBlock(nn.Module):
    """``h = x + attention(attention_norm(x))``, ``out = h + feed_forward(ffn_norm(h))``.

    Two all-reduces forward and two backward, whatever the model; with ``sequence_parallel`` each becomes a
    reduce-scatter and an all-gather, and what lies between them works on this rank's part of the sequence.
    ``init_base_seed`` is that of the whole model: layer ``layer_id`` draws from
    ``init_base_seed + (layer_id + 1) * SEEDS_PER_BLOCK`` on.
    """

    def __init__(
        self,
        layer_id: int,
        args: ModelArgs,
        *,
        group: Any = None,
        sequence_parallel: bool = False,
        init_base_seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.layer_id = layer_id
        seed = init_base_seed + (layer_id + 1) * SEEDS_PER_BLOCK
        place: dict[str, Any] = {"group": group_or_single(group), "sequence_parallel": sequence_parallel}
        options = place | {"dtype": dtype, "device": device}
        self.attention = Attention(args, init_base_seed=seed, **options)
        self.feed_forward = FeedForward(
            args.dim,
            4 * args.dim,
            args.multiple_of,
            args.ffn_dim_multiplier,
            size=args.ffn_dim,
            dropout=args.dropout,
            init_base_seed=seed + SEEDS_PER_BLOCK // 2,
            **options,
        )
        self.attention_norm = RMSNorm(args.dim, args.norm_eps, **options)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps, **options)
        self.attention_dropout = ParallelDropout(args.dropout, seed=seed + 5 * SEED_STRIDE, **place)
        self.ffn_dropout = ParallelDropout(args.dropout, seed=seed + 6 * SEED_STRIDE, **place)

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Rotation, mask: Mask = None) -> Tensor:
        """``x [b, s, h] -> [b, s, h]``, replicated, or with ``sequence_parallel`` both ``[b, s/w, h]``.

        The other arguments are those of ``Attention.forward``.
        """
        attended = self.attention_dropout(self.attention(self.attention_norm(x), start_pos, freqs_cis, mask))
        normed, h = self.ffn_norm(attended, x)
        out: Tensor = h + self.ffn_dropout(self.feed_forward(normed))
        return out
