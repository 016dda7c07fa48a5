"""The same bodies on GPUs: simulated ranks and gloo processes on one, and one NCCL rank on each. Skipped without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from src import Group
from src.modeling import ModelArgs, ParallelVocabEmbedding, Transformer
from src.testing import Ranks
from src.training import train_step

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
ARGS = ModelArgs(dim=64, n_layers=2, n_heads=8, vocab_size=100, multiple_of=32, max_seq_len=16, pad_vocab=True)

needs_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU, found none")
PLACES = [
    *[pytest.param(("simulated", n), id=f"simulated-{n}", marks=needs_gpu) for n in (1, 2, 4)],
    pytest.param(("gloo", 2), id="gloo-2", marks=needs_gpu),
    *[pytest.param(("nccl", n), id=f"nccl-{n}") for n in (2, 4)],
]


def train(group: Group, device: str) -> list[Tensor]:
    model = Transformer(ARGS, group=group).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(0)).to(device)
    batch = (ids[:, :-1], ids[:, 1:])
    results = [train_step(model, optimizer, [batch], group=group, max_norm=math.inf) for _ in range(4)]
    return [torch.stack([r.loss for r in results]).cpu(), torch.stack([r.grad_norm for r in results]).cpu()]


@pytest.mark.parametrize("place", PLACES)
def test_training_follows_the_cpu(place: tuple[str, int], ranks: Ranks) -> None:
    want = ranks.on("simulated", 1)(train, "cpu", num_shards=4)[0]
    for got in ranks.on(*place)(train, "cuda", num_shards=4):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def lookup(group: Group, device: str) -> Tensor:
    layer = ParallelVocabEmbedding(64, 8, process_group=group, num_shards=4).to(device)
    return layer(torch.arange(64, device=device)).detach().cpu()


@pytest.mark.parametrize("place", PLACES)
def test_embedding_has_the_bits_of_the_cpu(place: tuple[str, int], ranks: Ranks) -> None:
    want = ranks.on("simulated", 1)(lookup, "cpu", num_shards=4)[0]
    assert all(torch.equal(got, want) for got in ranks.on(*place)(lookup, "cuda", num_shards=4))


@needs_gpu
def test_ids_outside_the_vocabulary_with_check() -> None:
    layer = ParallelVocabEmbedding(64, 8, 0, 2, device="cuda", check=True)
    with pytest.raises(ValueError, match=r"value 64 at position \(0, 1\) on rank 0"):
        layer(torch.tensor([[3, 64]], device="cuda"))
