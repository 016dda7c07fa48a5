"""Sequence parallelism: the model without it is the reference."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from src import Group, Ledger, SimulationError
from src.distributed import gather_from_region
from src.generation import generate
from src.modeling import ModelArgs, ParallelVocabEmbedding, RowParallelLinear, Transformer, vocab_parallel_cross_entropy
from src.training import evaluate
from src.verification import audit_gradients, unsharded_gradients

from .conftest import OnRanks
from .places import places

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=8, vocab_size=40, multiple_of=32, max_seq_len=16, max_batch_size=2)
IDS = torch.randint(0, 40, (2, 17), generator=torch.Generator().manual_seed(0))


def train(group: Group, sequence_parallel: bool) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    model = Transformer(ARGS, group=group, sequence_parallel=sequence_parallel)
    loss = vocab_parallel_cross_entropy(model(IDS[:, :-1]), IDS[:, 1:], group=group)
    loss.backward()
    return loss.detach(), unsharded_gradients(model, group=group), audit_gradients(model, group=group)


@places()
@pytest.mark.parametrize("num_shards", [None, 8])
def test_loss_and_gradients_are_those_without(place: Any, on_ranks: OnRanks, num_shards: int | None) -> None:
    plain = on_ranks(place, train, False, num_shards=num_shards)
    for (loss, grads, findings), (want_loss, want, _) in zip(
        on_ranks(place, train, True, num_shards=num_shards), plain, strict=True
    ):
        assert findings == []
        torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
        for name in want:
            torch.testing.assert_close(grads[name], want[name], rtol=1e-4, atol=1e-6)


def sent(group: Group) -> Counter[tuple[str, str]]:
    model = Transformer(ARGS, group=group, sequence_parallel=True)
    with Ledger() as ledger:
        model(IDS[:, :-1]).sum().backward()
    return Counter((record.op, record.phase) for record in ledger.records)


@pytest.mark.parametrize("num_shards", [None, 8])
def test_every_all_reduce_becomes_a_reduce_scatter_and_an_all_gather(on_ranks: OnRanks, num_shards: int | None) -> None:
    layers, norms = ARGS.n_layers, 2 * ARGS.n_layers + 1
    want = {
        ("reduce_scatter", "forward"): 2 * layers + 1,  # the embedding, too
        ("all_gather", "forward"): 2 * layers + 1,  # the head, too
        ("reduce_scatter", "backward"): 2 * layers + 1,
        ("all_gather", "backward"): 2 * layers + 1,
        ("all_reduce", "backward"): norms,  # of their weights' gradients
    }
    assert on_ranks(("simulated", 4), sent, num_shards=num_shards) == [want] * 4


def row(group: Group) -> tuple[Tensor, Tensor, Tensor]:
    layer = RowParallelLinear(16, 8, group=group, sequence_parallel=True)
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).chunk(group.world_size, -1)[group.rank]
    y = layer(x)
    grad = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))
    y.backward(grad.chunk(group.world_size, 1)[group.rank].contiguous())
    return gather_from_region(y.detach(), group=group, dim=1), layer.bias.detach(), layer.bias.grad


@places(simulated=(1, 2, 4))
def test_bias_of_a_row_parallel_linear(place: Any, on_ranks: OnRanks) -> None:
    grad = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    want = on_ranks(("simulated", 1), row, num_shards=4)[0]
    for y, bias, bias_grad in on_ranks(place, row, num_shards=4):
        assert torch.equal(y, want[0]) and torch.equal(bias, want[1]) and torch.equal(bias_grad, want[2])
        torch.testing.assert_close(bias_grad.double(), grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


def lookup(group: Group) -> Tensor:
    layer = ParallelVocabEmbedding(40, 8, process_group=group, num_shards=4, sequence_parallel=True)
    return gather_from_region(layer(IDS[:, :16]).detach(), group=group, dim=1)


@places(simulated=(1, 2, 4))
def test_embedding_gives_each_rank_its_part(place: Any, on_ranks: OnRanks) -> None:
    whole = ParallelVocabEmbedding(40, 8, process_group=Group.single(4))(IDS[:, :16])
    assert all(torch.equal(got, whole) for got in on_ranks(place, lookup, num_shards=4))


def test_generation_and_evaluation(on_ranks: OnRanks) -> None:
    tokens, loss = on_ranks(("simulated", 2), generated, False)[0]
    for got_tokens, got_loss in on_ranks(("simulated", 2), generated, True):
        assert torch.equal(got_tokens, tokens)
        assert got_loss == pytest.approx(loss, rel=1e-6)


def generated(group: Group, sequence_parallel: bool) -> tuple[Tensor, float]:
    model = Transformer(ARGS, group=group, sequence_parallel=sequence_parallel)
    tokens = torch.stack(list(generate(model, IDS[:, :5], 8)))
    return tokens, evaluate(model, [(IDS[:, :-1], IDS[:, 1:])], group=group)


def test_evaluating_restores_what_it_changed() -> None:
    model = Transformer(ARGS, group=Group.single(8), sequence_parallel=True)

    def flags() -> list[tuple[bool, bool]]:
        return [(module.training, getattr(module, "sequence_parallel", False)) for module in model.modules()]

    before = flags()
    with pytest.raises(KeyError), model.evaluating(whole_sequences=True):
        assert not any(training or cut for training, cut in flags()) and not torch.is_grad_enabled()
        raise KeyError
    assert flags() == before and torch.is_grad_enabled()


def too_short(group: Group) -> None:
    Transformer(ARGS, group=group, sequence_parallel=True)(IDS[:, :9])


def test_lengths_that_do_not_divide(on_ranks: OnRanks) -> None:
    with pytest.raises(SimulationError, match="num_shards=4 must divide the sequence length 9"):
        on_ranks(("simulated", 4), too_short)
