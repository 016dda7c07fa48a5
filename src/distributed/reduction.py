"""The orders in which a sum over shards may be taken. Pure functions of tensors; nothing is sent here."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_OPERATORS = 4096
"""Bytes for each of four or more ranks up to which ``ring_sum`` makes copies for the sake of fewer operators."""


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """Sum of ``terms`` in the fixed binary tree: neighbours first, then neighbours of those.

    Over a power of two of terms, summing runs of neighbours first and then the run sums gives the same tree;
    that is why the result does not depend on how many ranks share the terms.
    """
    level = list(terms)
    while len(level) > 1:
        pairs = [level[i] + level[i + 1] for i in range(0, len(level) - 1, 2)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]


def ring_sum(terms: Sequence[Tensor]) -> Tensor:
    """Sum of equally shaped ``terms`` (one per rank) with the bits of gloo's ring all-reduce.

    gloo cuts the flat buffer into one block per rank, each made of two or more segments; block ``k`` is summed
    in rank order ``k-1, k-2, ..., k`` and rounded to the dtype at each step. Checked for contiguous CPU tensors
    up to 24 MB.
    """
    world_size, flat = len(terms), [term.reshape(-1) for term in terms]
    length, itemsize = flat[0].numel(), flat[0].element_size()
    if world_size > 3 and length * itemsize <= FEW_OPERATORS * world_size:
        blocks = _blocks_at_once(torch.stack(flat), _ring_block(length, itemsize, world_size))
        return blocks.view(-1)[:length].view(terms[0].shape)
    return ring_part(flat, 0, length).view(terms[0].shape)


def ring_part(terms: Sequence[Tensor], start: int, length: int) -> Tensor:
    """The elements of ``ring_sum`` from ``start`` on, given these of each term, flat, of ``length`` in all."""
    world_size, out = len(terms), torch.empty_like(terms[0])
    block = max(_ring_block(length, out.element_size(), world_size), 1)
    for k in range(start // block, -(-(start + len(out)) // block)):
        piece = slice(max(k * block - start, 0), (k + 1) * block - start)
        total = out[piece].copy_(terms[(k - 1) % world_size][piece])
        for step in range(2, world_size + 1):
            total += terms[(k - step) % world_size][piece]
    return out


def _ring_block(length: int, itemsize: int, world_size: int) -> int:
    """Elements of a block; the last ones may be shorter, or empty."""
    segment = _round_up(-(-length * itemsize // (2 * world_size)), itemsize)
    segments = max(-(-length * itemsize // segment), 2 * world_size) if length else 0
    return _round_up(segments, world_size) // world_size * segment // itemsize


def _blocks_at_once(terms: Tensor, block: int) -> Tensor:
    """``terms [rank, length] -> [rank, block]``: the sums of all blocks, with one operator for each step."""
    ranks = torch.arange(len(terms), device=terms.device)
    blocks = F.pad(terms, (0, len(terms) * block - terms.shape[1])).view(len(terms), len(terms), block)
    steps = blocks[(ranks - 1 - ranks[:, None]) % len(terms), ranks].unbind()
    return functools.reduce(torch.add, steps)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
