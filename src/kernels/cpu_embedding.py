"""Lookups in a slice of a table of embeddings on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..memory import zeros
from .accumulation import gradient_of_rows, is_added_to_grad

MIN_ELEMENTS = 2**14
"""From how many elements of rows on; never by the table's size, which depends on the world's."""


def supports(ids: Tensor, table: Tensor) -> bool:
    """Whether bags are faster than a mask."""
    if ids.dtype not in (torch.int32, torch.int64) or not table.is_floating_point():
        return False
    return ids.numel() * table.shape[1] >= MIN_ELEMENTS and ids.is_contiguous()


def shard_embedding(ids: Tensor, table: Tensor, first: int) -> Tensor:
    """Rows of ``table [n, e]`` for ids in ``[first, first + n)``, zeros for all others: ``[..., e]``."""
    rows: Tensor = _ShardEmbedding.apply(ids, table, first)
    return rows.view(*ids.shape, table.shape[1])


class _ShardEmbedding(torch.autograd.Function):
    """Each id is a bag of one row, or of none where the row lies elsewhere."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, first: int) -> Tensor:
        local = ids.reshape(-1).long() - first
        owned = (local >= 0) & (local < table.shape[0])
        found = local[owned]
        ctx.save_for_backward(found, owned)
        ctx.table_shape = table.shape
        rows: Tensor = torch.embedding_bag(table, found, owned.cumsum(0) - owned.long())[0]
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found, owned = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])[owned]
        if not is_added_to_grad(ctx.next_functions[1][0]):
            return None, zeros(ctx.table_shape, grad.dtype).index_add_(0, found, rows), None
        distinct, place = found.unique(return_inverse=True)
        sums = rows.new_zeros(len(distinct), rows.shape[1]).index_add_(0, place, rows)
        return None, gradient_of_rows(distinct, sums, ctx.table_shape[0]), None
