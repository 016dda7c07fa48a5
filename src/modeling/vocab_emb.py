"""Vocabulary embeddings: the whole table, or one slice of it per rank."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..distributed.group import Group, as_group
from ..distributed.random import fill_shards, normal
from ..distributed.regions import reduce_from_region, reduce_scatter_from_shards
from ..functional import shard_embedding
from ..sharding import check_num_shards, check_rank, padded_size, shard_range, shard_size
from .checks import check_ids
from .conversion import check_plain, take_parameters


class VocabEmbedding(nn.Module):
    """A table ``[v, e]`` drawn from N(init_mean, init_std) with ``init_seed``; ids select its rows."""

    def __init__(
        self,
        vocab_size: int,
        emb_size: int,
        init_mean: float = 0.0,
        init_std: float = 1.0,
        init_seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        self.vocab_size, self.emb_size = vocab_size, emb_size
        self.init_mean, self.init_std, self.init_seed = init_mean, init_std, init_seed
        self.weight = nn.Parameter(torch.empty(vocab_size, emb_size, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew from ``init_seed``."""
        fill_shards([self.weight], [self.init_seed], normal(self.init_mean, self.init_std))

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [b, s] -> [b, s, e]``, in the table's dtype, on the ids' device.

        Raises TypeError for ids that are not int32 or int64, ValueError for ids outside ``[0, v)``.
        """
        check_ids("ids", ids, self.vocab_size, rank=0)
        return shard_embedding(ids.to(self.weight.device), self.weight, 0).to(ids.device)


class ParallelVocabEmbedding(nn.Module):
    """Rank ``r`` of ``w`` holds rows ``[r * v/w, (r + 1) * v/w)`` of the table; logical shard j draws from base + j.

    **Group mode** (``rank`` and ``world_size`` not given, or agreeing with ``process_group``): both are read from
    ``process_group``, which is a ProcessGroup, a 1-D DeviceMesh, a Group, or None: the initialised default group, or
    a world of one. ``forward`` all-reduces and returns ``E [b, s, e]``.

    **Simulated-rank mode** (``rank`` and ``world_size`` given, no group): nothing is sent. ``forward`` returns the
    partial ``Er [b, s, e]``, exactly zero for the ids of other ranks, so that the sum over ranks is E.

    ``num_shards`` (default: ``world_size``, or the group's) fixes the initial values whatever the world size.
    ``pad_vocab`` pads a vocabulary that does not divide; padding rows are zero and never selected. ``check`` makes
    ids outside the vocabulary a ValueError on CUDA too, at the price of a wait per call. With ``sequence_parallel``, in
    group mode, ``forward`` reduce-scatters instead: each rank gets its part ``[b, s/w, e]`` of the sequence.
    ``padding_idx`` as in ``nn.Embedding``: that row starts as zeros and gets no gradient.

    Raises ValueError when only one of ``rank`` and ``world_size`` is given, when they contradict the group or each
    other, and when the vocabulary does not divide.
    """

    def __init__(
        self,
        vocab_size: int,
        emb_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        process_group: Any = None,
        init_mean: float = 0.0,
        init_std: float = 1.0,
        init_base_seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        num_shards: int | None = None,
        pad_vocab: bool = False,
        check: bool = False,
        sequence_parallel: bool = False,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.sequence_parallel, self.padding_idx = sequence_parallel, padding_idx
        self.vocab_size, self.emb_size, self.check = vocab_size, emb_size, check
        self.init_mean, self.init_std, self.init_base_seed = init_mean, init_std, init_base_seed
        self._place(rank, world_size, process_group, num_shards)
        rows = padded_size(vocab_size, self.num_shards)
        if not pad_vocab:
            remedy = f"pass pad_vocab=True to pad it to {rows}"
            shard_size("vocab_size", vocab_size, self.num_shards, self.world_size, remedy)
        local = rows // self.world_size
        self.first_id = self.rank * local
        self.weight = nn.Parameter(torch.empty(local, emb_size, dtype=dtype, device=device))
        self.reset_parameters()

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, *, group: Any = None, pad_vocab: bool = False) -> Self:
        """This rank's rows of an ordinary ``embedding`` that all ranks hold alike, in group mode.

        Raises ValueError when the vocabulary does not divide and ``pad_vocab`` is not set, and for the options
        ``max_norm``, ``scale_grad_by_freq`` and ``sparse``; TypeError when the table is no plain tensor.
        """
        layer = cls.shaped_like(embedding, group=group, pad_vocab=pad_vocab)
        take_parameters(layer, embedding)
        return layer

    @classmethod
    def shaped_like(cls, embedding: nn.Embedding, *, group: Any = None, pad_vocab: bool = False) -> Self:
        """What ``from_embedding`` returns, still without numbers: on the meta device."""
        check_plain(embedding)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(embedding, option):
                raise ValueError(f"nn.Embedding with {option}={getattr(embedding, option)} cannot be sharded")
        return cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            process_group=as_group(group),
            dtype=embedding.weight.dtype,
            device="meta",
            pad_vocab=pad_vocab,
            padding_idx=embedding.padding_idx,
        ).train(embedding.training)

    def _place(self, rank: int | None, world_size: int | None, process_group: Any, num_shards: int | None) -> None:
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank={rank} and world_size={world_size}: give both, or neither and a process_group")
        self.group: Group | None = None
        if rank is not None and world_size is not None and process_group is None:
            check_rank(rank, world_size)
            self.rank, self.world_size, self.num_shards = (
                rank,
                world_size,
                world_size if num_shards is None else num_shards,
            )
            check_num_shards(self.num_shards, world_size)
            return
        self.group = as_group(process_group, num_shards)
        self.rank, self.world_size, self.num_shards = self.group.rank, self.group.world_size, self.group.num_shards
        if rank is not None and (rank, world_size) != (self.rank, self.world_size):
            raise ValueError(
                f"rank={rank}, world_size={world_size} disagree with the process group, "
                f"where rank={self.rank}, world_size={self.world_size}; leave both out"
            )

    def reset_parameters(self) -> None:
        """Draw this rank's logical shards anew; padding rows become zero."""
        shards = shard_range(self.rank, self.world_size, self.num_shards)
        seeds = [self.init_base_seed + shard for shard in shards]
        fill_shards(self.weight.detach().chunk(len(shards)), seeds, normal(self.init_mean, self.init_std))
        with torch.no_grad():
            self.weight[max(self.vocab_size - self.first_id, 0) :].zero_()
            if self.padding_idx is not None and 0 <= self.padding_idx - self.first_id < len(self.weight):
                self.weight[self.padding_idx - self.first_id].zero_()

    def shard_dims(self) -> dict[str, int]:
        """The sharded parameters and their sharded dim."""
        return {} if self.num_shards == 1 else {"weight": 0}

    def unpadded_sizes(self) -> dict[str, int]:
        """Real lengths of the sharded dims that may be padded."""
        return {"weight": self.vocab_size}

    def forward(self, ids: Tensor) -> Tensor:
        """``ids [b, s] -> E [b, s, e]`` (group mode) or ``Er [b, s, e]`` (simulated-rank mode).

        In the table's dtype, on the ids' device. Raises TypeError for ids that are not int32 or int64, ValueError for
        ids outside ``[0, v)``.
        """
        check_ids("ids", ids, self.vocab_size, self.rank, sync=self.check)
        if self.sequence_parallel and ids.dim() != 2:
            raise ValueError(f"sequence_parallel: ids must be [b, s], got a tensor of shape {list(ids.shape)}")
        local = shard_embedding(ids.to(self.weight.device), self.weight, self.first_id)
        if self.padding_idx is not None:
            local = torch.where((ids == self.padding_idx).to(local.device).unsqueeze(-1), local.detach(), local)
        if self.group is not None and self.sequence_parallel:
            local = reduce_scatter_from_shards([local], group=self.group)
        elif self.group is not None:
            local = reduce_from_region(local, group=self.group)
        return local.to(ids.device)
