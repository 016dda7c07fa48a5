"""Dropout whose masks belong to logical shards: the same at every size, fresh at every call, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src import Group
from src.checkpoint import load, save
from src.distributed import gather_from_region, join_shards
from src.modeling import ModelArgs, ParallelDropout, Transformer
from src.training import evaluate, train_step

from .conftest import OnRanks
from .places import places

ARGS = ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=40, multiple_of=32, max_seq_len=8, dropout=0.2)


def drop(group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """A sharded, a replicated and a sequence-parallel tensor of ones, dropped and made whole."""
    per_shard = ParallelDropout(0.25, group=group)
    sharded = join_shards(per_shard.forward_shards([torch.ones(2, 8, 4) for _ in group.shards]))
    replicated = ParallelDropout(0.25, group=group)(torch.ones(2, 8, 16))
    cut = ParallelDropout(0.25, group=group, sequence_parallel=True)(torch.ones(2, 8 // group.world_size, 16))
    return gather_from_region(sharded, group=group), replicated, gather_from_region(cut, group=group, dim=1)


@places(simulated=(2, 4, 8))
def test_masks_do_not_depend_on_the_number_of_ranks(place: Any, on_ranks: OnRanks) -> None:
    want = on_ranks(("simulated", 1), drop, num_shards=8)[0]
    for got in on_ranks(place, drop, num_shards=8):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_fraction_scale_and_independence() -> None:
    state = torch.get_rng_state()
    layer = ParallelDropout(0.25, group=Group.single(8))
    first, second = (layer.forward_shards([torch.ones(5000)] * 8) for _ in range(2))
    values = torch.cat(first)
    assert values.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (values == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    other_seed = ParallelDropout(0.25, group=Group.single(8), seed=1).forward_shards([torch.ones(5000)] * 8)
    masks = [*first, *second, *other_seed]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_follows_the_mask() -> None:
    x = torch.ones(1000, requires_grad=True)
    y = ParallelDropout(0.5)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_evaluation_and_zero_probability_change_nothing() -> None:
    x = torch.randn(10)
    layer = ParallelDropout(0.5)
    assert layer.eval()(x) is x and ParallelDropout(0.0)(x) is x
    assert int(layer.calls) == 0 and "calls" not in ParallelDropout(0.0).state_dict()
    model = Transformer(ARGS)
    ids = torch.arange(16).view(2, 8)
    assert evaluate(model, [(ids, ids)], group=Group.single()) == evaluate(model, [(ids, ids)], group=Group.single())
    assert model.training


def test_counter_is_state_and_stays_what_it_is() -> None:
    layer = ParallelDropout(0.5)
    layer(torch.ones(2))
    moved = layer.to(torch.bfloat16)
    assert moved.calls.dtype == torch.int64 and int(moved.state_dict()["calls"]) == 1


def train(group: Group, steps: range, source: Path | None, target: Path | None) -> list[Tensor]:
    model = Transformer(ARGS, group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if source is not None:
        load(source, model, optimizer, group=group)
    ids = torch.arange(16).view(2, 8)
    losses = [train_step(model, optimizer, [(ids, ids)], group=group).loss for _ in steps]
    if target is not None:
        save(target, model, optimizer, group=group)
    return losses


def test_a_resumed_run_goes_on_with_fresh_masks(on_ranks: OnRanks, tmp_path: Path) -> None:
    whole = on_ranks(("simulated", 1), train, range(4), None, None, num_shards=4)[0]
    first = on_ranks(("simulated", 2), train, range(2), None, tmp_path / "c", num_shards=4)[0]
    second = on_ranks(("simulated", 4), train, range(2), tmp_path / "c", None, num_shards=4)[0]
    assert torch.equal(torch.stack(first + second), torch.stack(whole))


def test_activation_checkpointing_repeats_the_masks() -> None:
    grads = []
    for recompute in (False, True):
        layer, x = ParallelDropout(0.5), torch.ones(1000, requires_grad=True)

        def twice(x: Tensor, layer: ParallelDropout = layer) -> Tensor:
            return layer(x).square()

        y = checkpoint(twice, x, use_reentrant=False) if recompute else twice(x)
        y.sum().backward()
        grads.append(x.grad)
        assert int(layer.calls) == 1
    assert torch.equal(*grads)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_bad_probabilities(p: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout p={p} must lie in \[0, 1\)"):
        ParallelDropout(p)
