"""Llama 3's attention: grouped queries, rotary embeddings, a KV cache; heads sharded over the group."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.group import group_or_single
from ..distributed.random import SEED_STRIDE
from ..functional import Rotation, rotate_queries_and_keys
from ..sharding import shard_size
from .checks import check_activations
from .columns import column_shards
from .config import ModelArgs
from .dropout import ParallelDropout
from .kv_linear import KVParallelLinear
from .linear import ColumnParallelLinear, RowParallelLinear

Mask: TypeAlias = Tensor | Literal["causal"] | None
"""What queries must not see: an additive tensor, "causal" (later positions, without a mask in memory), or nothing."""


class Attention(nn.Module):
    """``wo(softmax(q k^T / sqrt(hd) + mask) v)``; each logical shard computes whole heads, so no score is ever sent.

    q, k and v share their input: one all-reduce forward (``wo``), one backward. The KV cache holds
    ``max_batch_size x max_seq_len`` positions of this rank's heads, is allocated on first use and is no part of the
    state dict.

    With ``group=None`` this is an ordinary single-process module. Fewer kv heads than logical shards are shared by runs
    of them (``KVParallelLinear``). Raises ValueError when the logical shards do not divide the heads, or neither divide
    nor are divided by the kv heads.
    """

    cache_k: Tensor | None
    cache_v: Tensor | None

    def __init__(
        self,
        args: ModelArgs,
        *,
        group: Any = None,
        sequence_parallel: bool = False,
        init_base_seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.args, self.group, self.sequence_parallel = args, group_or_single(group), sequence_parallel
        shard_size("n_heads", args.n_heads, self.group.num_shards, self.group.world_size)
        options: dict[str, Any] = {"group": self.group, "dtype": dtype, "device": device}
        seeds = range(init_base_seed, init_base_seed + 5 * SEED_STRIDE, SEED_STRIDE)
        width = args.n_heads * args.head_dim
        self.wq = ColumnParallelLinear(args.dim, width, bias=False, init_base_seed=seeds[0], **options)
        self.wk, self.wv = (self._kv_projection(init_base_seed=seed, **options) for seed in seeds[1:3])
        self.wo = RowParallelLinear(width, args.dim, bias=False, init_base_seed=seeds[3], **options)
        self.wo.sequence_parallel = sequence_parallel
        self.dropout = ParallelDropout(args.dropout, group=self.group, seed=seeds[4])
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)
        self._cached = (0, 0)  # sequences and positions that the cache holds

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Rotation, mask: Mask = None) -> Tensor:
        """``x [b, s, h] -> [b, s, h]``, both replicated, or with ``sequence_parallel`` both ``[b, s/w, h]``.

        ``freqs_cis [s, hd/2]`` are the angles of positions ``[start_pos, start_pos + s)``; a pair of cos and sin
        ``[s, hd]`` rotates halves instead. ``mask`` is additive, of x's dtype, ``[s, start_pos + s]`` or ``[b, 1, s,
        start_pos + s]``; None means that every query sees every position, "causal" (``start_pos=0`` only) that it sees
        none after its own. Keys and values before ``start_pos`` come from the cache. With gradients enabled and
        ``start_pos=0`` the cache is not touched.

        Raises ValueError for positions beyond ``max_seq_len``, batches above ``max_batch_size`` (both where the cache
        is used) and a mask that does not fit, TypeError for a mask of another dtype.
        """
        check_activations(x, self.args.dim, "Attention", sequence=True)
        self._check_positions(x, start_pos, mask)
        place: dict[str, Any] = {"group": self.group, "sequence_parallel": self.sequence_parallel}
        q, k, v = (self._heads(y) for y in column_shards(x, (self.wq, self.wk, self.wv), **place))
        turned = [rotate_queries_and_keys(*heads, freqs_cis) for heads in zip(q, k, strict=True)]
        q, k = (list(heads) for heads in zip(*turned, strict=True))
        if start_pos > 0 or not torch.is_grad_enabled():
            k, v = self._through_cache(k, v, start_pos)
        heads = [self._attend(*qkv, mask) for qkv in zip(q, k, v, strict=True)]
        return self.wo.forward_shards(self.dropout.forward_shards(heads))

    def _kv_projection(self, **options: Any) -> ColumnParallelLinear | KVParallelLinear:
        args, shards = self.args, self.group.num_shards
        if args.kv_heads < shards or args.kv_heads % shards:
            return KVParallelLinear(args.dim, args.kv_heads, args.head_dim, **options)
        return ColumnParallelLinear(args.dim, args.kv_heads * args.head_dim, bias=False, **options)

    def _heads(self, projected: list[Tensor]) -> list[Tensor]:
        """``[b, s, heads, hd]`` per logical shard."""
        return [y.unflatten(-1, (-1, self.args.head_dim)) for y in projected]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """``[b, s, heads, hd]`` of one logical shard -> ``[b, s, heads * hd]``."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        how: dict[str, Any] = {"is_causal": True} if isinstance(mask, str) else {"attn_mask": mask}
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **how)
        return y.transpose(1, 2).flatten(-2)

    def _through_cache(self, k: list[Tensor], v: list[Tensor], start_pos: int) -> tuple[list[Tensor], list[Tensor]]:
        """Store the new keys and values; give back those of all positions ``[0, start_pos + s)``."""
        batch, end = k[0].shape[0], start_pos + k[0].shape[1]
        self._check_cache(batch, start_pos, end, k[0].dtype)
        if self.cache_k is None or self.cache_v is None or (start_pos == 0 and self.cache_k.dtype != k[0].dtype):
            self.cache_k, self.cache_v = self._new_cache(k[0]), self._new_cache(v[0])
        self._cached = (batch, end)

        def seen(fresh: Tensor, stored: Tensor) -> Tensor:
            with torch.no_grad():
                stored[:batch, start_pos:end] = fresh
            if start_pos == 0:
                return fresh
            return (
                torch.cat([stored[:batch, :start_pos], fresh], 1) if torch.is_grad_enabled() else stored[:batch, :end]
            )

        caches = (self.group.split(cache, 2) for cache in (self.cache_k, self.cache_v))
        new_k, new_v = (list(map(seen, new, cache)) for new, cache in zip((k, v), caches, strict=True))
        return new_k, new_v

    def _new_cache(self, like: Tensor) -> Tensor:
        heads = like.shape[2] * len(self.group.shards)
        with torch.inference_mode(False):
            return like.new_zeros(self.args.max_batch_size, self.args.max_seq_len, heads, self.args.head_dim)

    def _check_cache(self, batch: int, start_pos: int, end: int, dtype: torch.dtype) -> None:
        if batch > self.args.max_batch_size:
            raise ValueError(
                f"batch size {batch} exceeds max_batch_size={self.args.max_batch_size} of the KV cache, which calls "
                "without gradients fill; raise max_batch_size"
            )
        if end > self.args.max_seq_len:
            raise ValueError(
                f"start_pos={start_pos} + {end - start_pos} positions exceed max_seq_len={self.args.max_seq_len}"
            )
        sequences, positions = self._cached
        if start_pos > 0 and self.cache_k is not None and self.cache_k.dtype != dtype:
            raise TypeError(f"the KV cache holds {self.cache_k.dtype}, the new keys are {dtype}; begin at start_pos=0")
        if start_pos > 0 and (start_pos > positions or batch > sequences):
            raise ValueError(
                f"start_pos={start_pos} and batch size {batch}, but the KV cache holds {positions} positions of "
                f"{sequences} sequences; begin at start_pos=0 under torch.no_grad()"
            )

    def _check_positions(self, x: Tensor, start_pos: int, mask: Mask) -> None:
        if start_pos < 0:
            raise ValueError(f"start_pos={start_pos} must not be negative")
        if mask is None:
            return
        if not isinstance(mask, Tensor):
            if mask != "causal":
                raise ValueError(f'mask={mask!r} is neither a tensor nor "causal"')
            if start_pos > 0:
                raise ValueError(f'mask="causal" is for start_pos=0, not {start_pos}: pass functional.causal_mask')
            return
        if mask.dtype != x.dtype:
            raise TypeError(f"mask must be additive and of x's dtype {x.dtype}, not {mask.dtype}; use mask.to(x.dtype)")
        length = x.shape[1] * (self.group.world_size if self.sequence_parallel else 1)
        if mask.shape not in ((length, start_pos + length), (x.shape[0], 1, length, start_pos + length)):
            raise ValueError(
                f"mask must be [s, start_pos + s] = [{length}, {start_pos + length}], got {list(mask.shape)}"
            )
