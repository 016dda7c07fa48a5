"""Generation through the KV cache against repeated full forwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from src import Group
from src.distributed import gather_from_region
from src.generation import generate
from src.modeling import ModelArgs, Transformer
from src.testing import Ranks

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=50, multiple_of=32, max_seq_len=24, pad_vocab=True)
PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def greedy(group: Group) -> Tensor:
    return torch.stack(list(generate(Transformer(ARGS, group=group), PROMPT, 12)), 1)


def greedy_by_full_forwards(group: Group) -> Tensor:
    model, ids = Transformer(ARGS, group=group), PROMPT
    for _ in range(12):
        logits = gather_from_region(model(ids).detach(), group=group)[:, -1, : ARGS.vocab_size]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, PROMPT.shape[1] :]


@pytest.mark.ranks(1, 2, 4, gloo=2)
def test_greedy_text_is_that_of_full_forwards(ranks: Ranks) -> None:
    cached, full = ranks(greedy), ranks(greedy_by_full_forwards)
    assert all(torch.equal(tokens, full[0]) for tokens in cached)


def sampled(group: Group, temperature: float, seed: int) -> Tensor:
    model = Transformer(ARGS, group=group)
    return torch.stack(list(generate(model, PROMPT, 12, temperature=temperature, seed=seed)), 1)


@pytest.mark.ranks(4, gloo=2)
def test_all_ranks_draw_the_same_tokens(ranks: Ranks) -> None:
    first, *others = ranks(sampled, 1.0, 7)
    assert all(torch.equal(tokens, first) for tokens in others)
    assert not torch.equal(first, ranks(sampled, 1.0, 8)[0])
    assert torch.equal(ranks(sampled, 1e-6, 7)[0], ranks(greedy)[0])


def test_padding_is_never_generated() -> None:
    args = ModelArgs(dim=32, n_layers=1, n_heads=8, vocab_size=3, multiple_of=32, max_seq_len=64, pad_vocab=True)
    model = Transformer(args, group=Group.single(8))
    tokens = torch.stack(list(generate(model, torch.tensor([[1]]), 60, temperature=5.0)))
    assert set(tokens.flatten().tolist()) == {0, 1, 2}


def test_bad_requests() -> None:
    model = Transformer(ARGS)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, PROMPT[:, :0], 3)
    with pytest.raises(ValueError, match="temperature=-1"):
        generate(model, PROMPT, 3, temperature=-1)
    with pytest.raises(ValueError, match=r"prompt of 5 tokens \+ max_new_tokens=20 exceed .* max_seq_len=24"):
        generate(model, PROMPT, 20)
