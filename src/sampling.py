"""The next token from logits that are sharded over the vocabulary, the same on every rank and at every world size.

Only what decides is sent: the best token of each rank when greedy, its ``top_k`` best where that bounds the choice, and
all logits otherwise. Equal logits go to the lower id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed.collectives import all_gather
from .distributed.group import Group


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy; otherwise one of the ``top_k`` likeliest tokens (None: of all) is drawn, and of
    these one of the smallest set that holds at least ``top_p`` of the probability (Holtzman et al. 2020).

    Raises ValueError for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must not be negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; None leaves all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")


def next_tokens(
    logits: Tensor, sampling: Sampling, vocab_size: int, generator: torch.Generator, *, group: Group
) -> Tensor:
    """``logits [b, v/w]`` to ids ``[b]``, drawn with ``generator``, whose state must be alike on all ranks."""
    if sampling.temperature == 0 or sampling.top_k == 1:
        return _best(logits, 1, group)[1].squeeze(1)
    if sampling.top_k is not None:
        values, ids = _best(logits, min(sampling.top_k, vocab_size), group)
    else:
        values, ids = all_gather(logits, group=group, dim=-1)[:, :vocab_size].sort(dim=-1, descending=True, stable=True)
    chances = (values.float() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= sampling.top_p, 0)
    drawn = torch.multinomial(chances, 1, generator=generator)
    return ids.gather(1, drawn).squeeze(1)


def _best(logits: Tensor, count: int, group: Group) -> tuple[Tensor, Tensor]:
    """The ``count`` largest logits of the vocabulary, descending, and their ids: both ``[b, count]``."""
    local = min(count, logits.shape[-1])
    if count == 1:
        values, ids = logits.max(-1, keepdim=True).values, logits.argmax(-1, keepdim=True)
    else:
        values, ids = (part[:, :local] for part in logits.sort(dim=-1, descending=True, stable=True))
    pairs = torch.stack([values.double(), (ids + group.rank * logits.shape[-1]).double()])
    values, ids = all_gather(pairs, group=group, dim=-1).unbind()
    order = values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return values.gather(1, order).to(logits.dtype), ids.gather(1, order).long()
