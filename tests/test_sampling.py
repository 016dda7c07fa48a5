"""The choice of the next token: the right one, drawn with the right chances, from as few logits as decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from src import Group, Ledger, simulate
from src.sampling import Sampling, next_tokens
from src.testing import Ranks

VOCABULARY = 61
"""Padded to 64 where it is sharded."""


def logits(rows: int) -> Tensor:
    """Many of them equal."""
    return torch.randint(-6, 6, (rows, VOCABULARY), generator=torch.Generator().manual_seed(3)).float() / 2


def drawn(group: Group, sampling: Sampling, rows: Tensor, seed: int = 0) -> Tensor:
    padded = torch.nn.functional.pad(rows, (0, 64 - VOCABULARY), value=-torch.inf)
    local = padded.chunk(group.world_size, -1)[group.rank]
    return next_tokens(local, sampling, VOCABULARY, torch.Generator().manual_seed(seed), group=group)


@pytest.mark.ranks(1, 2, 4, 8, gloo=2)
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7, top_k=5), Sampling(1.3, 40, 0.8), Sampling(1.0, None, 0.6), Sampling(2.0)]
)
def test_the_same_on_every_rank_and_at_every_size(ranks: Ranks, sampling: Sampling) -> None:
    """Ties, too: the lower id wins."""
    want = drawn(Group.single(), sampling, logits(40))
    assert all(torch.equal(got, want) for got in ranks(drawn, sampling, logits(40)))


def test_greedy_takes_the_first_of_the_best() -> None:
    want = logits(40).numpy().argmax(-1).tolist()
    for sampling in (Sampling(), Sampling(5.0, top_k=1)):
        assert drawn(Group.single(), sampling, logits(40)).tolist() == want


@pytest.mark.parametrize("top_k, top_p", [(None, 1.0), (7, 1.0), (None, 0.5), (20, 0.9), (200, 1.0), (3, 0.01)])
def test_chances(top_k: int | None, top_p: float) -> None:
    """Against an oracle in numpy: 20,000 draws, each share within five standard errors, nothing outside the set."""
    count, temperature = 20_000, 0.8
    row = logits(1)[0].double().numpy() / temperature
    order = np.lexsort((np.arange(VOCABULARY), -row))[:top_k]
    chances = np.exp(row[order] - row[order].max())
    chances /= chances.sum()
    kept = np.concatenate([[0], chances.cumsum()[:-1]]) < top_p
    chances = np.where(kept, chances, 0) / chances[kept].sum()
    rows = logits(1).expand(count, -1)
    ids = simulate(drawn, 4, Sampling(temperature, top_k, top_p), rows, 11)[2].numpy()
    shares = np.bincount(ids, minlength=VOCABULARY)[order] / count
    assert np.bincount(ids, minlength=VOCABULARY)[order].sum() == count and not shares[chances == 0].any()
    assert (np.abs(shares - chances) <= 5 * np.sqrt(chances * (1 - chances) / count) + 1e-9).all()


def test_only_what_decides_is_sent() -> None:
    def payload(group: Group, sampling: Sampling) -> int:
        with Ledger() as ledger:
            drawn(group, sampling, logits(2))
        assert len(ledger.records) == 1
        return ledger.records[0].payload_bytes

    for sampling, size in ((Sampling(), 1), (Sampling(1.0, top_k=3), 3)):
        assert simulate(payload, 4, sampling) == [2 * 2 * size * 8] * 4  # value and id, two rows, float64
    assert simulate(payload, 4, Sampling(1.0)) == [2 * 16 * 4] * 4
