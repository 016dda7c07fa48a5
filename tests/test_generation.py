"""Generation through the KV cache against repeated full forwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src import Group, simulate
from src.distributed import gather_from_region
from src.formats import load_hugging_face, read_model_args
from src.generation import generate
from src.modeling import ModelArgs, Transformer
from src.testing import Ranks

from .llama_directories import LENGTH, VARIANTS, write

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


PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5]]


def together(group: Group, **options: Any) -> Tensor:
    return torch.stack(list(generate(Transformer(ARGS, group=group), PROMPTS, 12, **options)), 1)


@pytest.mark.ranks(1, 2, 4, gloo=2)
def test_prompts_of_unequal_length_continue_as_they_would_alone(ranks: Ranks) -> None:
    alone = [list(generate(Transformer(ARGS), [prompt], 12)) for prompt in PROMPTS]
    weights = ranks(together)
    if ranks.world_size > 1:  # other weights: V = w
        alone = [ranks(alone_on_ranks, prompt)[0] for prompt in PROMPTS]
    for tokens in weights:
        assert [list(map(int, row)) for row in tokens] == [list(map(int, row)) for row in alone]


def alone_on_ranks(group: Group, prompt: list[int]) -> list[Tensor]:
    return list(generate(Transformer(ARGS, group=group), [prompt], 12))


def test_rows_stop_one_by_one() -> None:
    plain = together(Group.single())
    first, second = int(plain[0, 2]), int(plain[1, 5])
    stopped = together(Group.single(), stop=[first, second])
    for row, want in zip(stopped.tolist(), plain.tolist(), strict=True):
        end = min([want.index(stop) for stop in (first, second) if stop in want], default=len(want) - 1)
        assert row[: end + 1] == want[: min(end + 1, len(row))] and set(row[end:]) == {row[end]}
    alone = list(generate(Transformer(ARGS), PROMPTS[:1], 12, stop=[first]))
    assert len(alone) == plain[0].tolist().index(first) + 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    """Past the trained length, too; and with prompts of unequal length, for all rules that do not depend on it."""
    model = write(tmp_path, variant)
    args = replace(read_model_args(tmp_path), max_seq_len=LENGTH + 24, max_batch_size=3)
    batches = [[[3, 1, 4, 1, 5]], [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5]]]
    for prompts, count in zip(batches, (LENGTH + 10, 20), strict=True):
        want = theirs(model, prompts, count)
        for world_size in (1, 2, 4):
            for tokens in simulate(imported, world_size, tmp_path, args, prompts, count):
                assert tokens == want


def theirs(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=count, **options)
    return [list(map(int, row)) for row in tokens[:, longest:]]


def imported(group: Group, path: Path, args: ModelArgs, prompts: list[list[int]], count: int) -> list[list[int]]:
    model = load_hugging_face(path, args, group=group)
    return torch.stack(list(generate(model, prompts, count)), 1).tolist()


def test_bad_requests() -> None:
    model = Transformer(ARGS)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, PROMPT[:, :0], 3)
    with pytest.raises(ValueError, match="temperature=-1"):
        generate(model, PROMPT, 3, temperature=-1)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, [[1], []], 3)
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        generate(model, PROMPT, 3, temperature=1, top_k=0)
    with pytest.raises(ValueError, match=r"top_p=0 must lie in \(0, 1\]"):
        generate(model, PROMPT, 3, temperature=1, top_p=0)
    with pytest.raises(ValueError, match=r"prompt of 5 tokens \+ max_new_tokens=20 exceed .* max_seq_len=24"):
        generate(model, PROMPT, 20)
