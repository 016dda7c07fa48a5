"""ParallelDropout: masks that belong to (seed, call, logical shard) and to nothing else."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src import Group
from src.checkpoint import load, save
from src.distributed.regions import split_shards
from src.modeling import ModelArgs, ParallelDropout, Transformer
from src.testing import Ranks
from src.training import train_step
from src.verification import unsharded_gradients

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=8, vocab_size=48, multiple_of=32, max_seq_len=8, dropout=0.2)
SIZES = [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]


def dropped(layer: ParallelDropout, *shape: int) -> Tensor:
    return layer(torch.ones(shape)) == 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fraction_scale_and_gradient(p: float, dtype: torch.dtype) -> None:
    x = torch.linspace(1, 2, 40_000, dtype=dtype).requires_grad_()
    y = ParallelDropout(p)(x)
    y.backward(torch.full_like(y, 3))
    mask = y != 0
    assert y.dtype == dtype
    assert abs(mask.double().mean().item() - (1 - p)) < 4 * (p * (1 - p) / len(x)) ** 0.5
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(y.double(), torch.where(mask, x.double() / (1 - p), 0), **tolerance)
    torch.testing.assert_close(x.grad.double(), mask.double() * (3 / (1 - p)), **tolerance)


def test_masks_of_shards_calls_and_seeds_differ() -> None:
    shards = [torch.ones(50, 40)] * 8
    layers = [ParallelDropout(0.5, group=Group.single(8), seed=seed) for seed in (1, 2)]
    masks = [y == 0 for layer in layers for _ in range(3) for y in layer.forward_shards(shards)]
    masks += [dropped(layer, 50, 40) for layer in layers for _ in range(3)]
    for one, other in itertools.combinations(masks, 2):
        assert 0.4 < (one == other).double().mean() < 0.6  # independent masks agree on half of the elements
    again = ParallelDropout(0.5, group=Group.single(8), seed=1).forward_shards(shards)
    assert all(torch.equal(y == 0, mask) for y, mask in zip(again, masks[:8], strict=True))


def test_dropout_layers_of_a_model_have_seeds_of_their_own() -> None:
    seeds = [m.seed for m in Transformer(ARGS).modules() if isinstance(m, ParallelDropout)]
    assert len(seeds) == len(set(seeds)) == 4 * 2


def masks(group: Group, kind: str) -> Tensor:
    """Two calls on ones ``[2, 8, 16]``: this rank's part of a tensor sharded over its last dim or over the sequence,
    or all of a replicated one."""
    layer, x = ParallelDropout(0.5, group=group, sequence_parallel=kind == "sequence"), torch.ones(2, 8, 16)
    if kind == "replicated":
        return torch.stack([layer(x), layer(x)])
    dim = 1 if kind == "sequence" else 2
    part = x.chunk(group.world_size, dim)[group.rank]
    if kind == "sequence":
        return torch.stack([layer(part), layer(part)])
    shards = split_shards(part, group=group)
    return torch.stack([torch.cat(layer.forward_shards(shards), dim) for _ in range(2)])


@pytest.mark.parametrize("kind, dim", [("sharded", 3), ("sequence", 2), ("replicated", None)])
def test_masks_are_the_same_at_every_size(ranks: Ranks, kind: str, dim: int | None) -> None:
    (want,) = ranks.on("simulated", 1)(masks, kind, num_shards=8)
    assert want.shape == (2, 2, 8, 16) and not torch.equal(want[0], want[1])
    for place in SIZES:
        parts = ranks.on(*place)(masks, kind, num_shards=8)
        assert all(torch.equal(got, want) for got in (parts if dim is None else [torch.cat(parts, dim)])), place


@pytest.mark.ranks(2, 4, gloo=2)
def test_without_fixed_shards_ranks_agree_where_the_tensor_is_replicated(ranks: Ranks) -> None:
    first, *others = ranks(masks, "replicated")
    assert all(torch.equal(other, first) for other in others)
    for kind in ("sharded", "sequence"):
        for one, other in itertools.combinations(ranks(masks, kind), 2):
            assert not torch.equal(one, other), kind


def test_evaluation_and_p_zero_are_the_identity() -> None:
    x = torch.randn(3, 4)
    for layer in (ParallelDropout(0.0), ParallelDropout(0.5).eval()):
        assert layer(x) is x
        shards = layer.forward_shards([x])
        assert len(shards) == 1 and shards[0] is x
    assert ParallelDropout(0.0).state_dict() == {}
    layer = ParallelDropout(0.5)
    first, _, second = dropped(layer, 99), layer.eval()(x), dropped(layer.train(), 99)
    fresh = ParallelDropout(0.5)
    assert torch.equal(first, dropped(fresh, 99)) and torch.equal(second, dropped(fresh, 99))


def test_the_global_random_state_neither_changes_nor_matters() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    mask = dropped(ParallelDropout(0.5), 99)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(dropped(ParallelDropout(0.5), 99), mask)


def test_the_default_dtype_does_not_matter() -> None:
    want = ParallelDropout(0.1)(torch.ones(999, dtype=torch.float32))
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = ParallelDropout(0.1)(torch.ones(999, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


def test_the_counter_is_an_integer_on_the_cpu() -> None:
    layer = ParallelDropout(0.5)
    for count, move in enumerate([{}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}]):
        layer.to(**move)
        dropped(layer, 9)
        (calls,) = layer.state_dict().values()
        assert (calls.dtype, calls.device.type, calls.item()) == (torch.int64, "cpu", count + 1)
    other = ParallelDropout(0.5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(dropped(other, 99), dropped(layer, 99))


def batch(step: int) -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(0, ARGS.vocab_size, (2, 9), generator=torch.Generator().manual_seed(step))
    return [(ids[:, :-1], ids[:, 1:])]


def train(group: Group, steps: range, source: Path | None, target: Path | None, reset: bool) -> Tensor:
    """Losses of ``steps``, continuing from ``source`` and saving to ``target``."""
    model = Transformer(ARGS, group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if source is not None:
        load(source, model, optimizer, group=group)
    for module in model.modules():
        if reset and isinstance(module, ParallelDropout):
            module.calls.zero_()
    losses = [train_step(model, optimizer, batch(i), group=group).loss for i in steps]
    if target is not None:
        save(target, model, optimizer, group=group)
    return torch.stack(losses)


def test_a_resumed_run_goes_on_with_the_masks(ranks: Ranks, tmp_path: Path) -> None:
    (want,) = ranks.on("simulated", 1)(train, range(4), None, None, False, num_shards=8)
    first = ranks.on("simulated", 4)(train, range(2), None, tmp_path / "c", False, num_shards=8)[0]
    for place in [("simulated", 1), ("simulated", 8), ("gloo", 2)]:
        for second in ranks.on(*place)(train, range(2, 4), tmp_path / "c", None, False, num_shards=8):
            assert torch.equal(torch.cat([first, second]), want), place
    (repeating,) = ranks.on("simulated", 1)(train, range(2, 4), tmp_path / "c", None, True, num_shards=8)
    assert not torch.equal(repeating, want[2:])


def gradients(group: Group, recompute: bool, sequence_parallel: bool) -> tuple[dict[str, Tensor], list[Any]]:
    """Gradients summed over two steps, and how often each dropout was called."""
    model = Transformer(ARGS, group=group, sequence_parallel=sequence_parallel)
    for layer in model.layers:
        if recompute:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for step in range(2):
        model(batch(step)[0][0]).square().mean().backward()
    counts = [int(m.calls) for m in model.modules() if isinstance(m, ParallelDropout)]
    return unsharded_gradients(model, group=group), counts


@pytest.mark.ranks(1, 2, gloo=2)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_activation_checkpointing_repeats_the_masks(ranks: Ranks, sequence_parallel: bool) -> None:
    stored, recomputed = (ranks(gradients, flag, sequence_parallel, num_shards=8) for flag in (False, True))
    for (want, counts), (got, counts_again) in zip(stored, recomputed, strict=True):
        assert counts == counts_again == [2] * 8
        assert got.keys() == want.keys()
        assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan")])
def test_probabilities_outside_the_range(p: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout p={p} must lie in \[0, 1\)"):
        ParallelDropout(p)
    with pytest.raises(ValueError, match=rf"dropout={p} must lie in \[0, 1\)"):
        Transformer(ModelArgs(dim=32, n_layers=1, n_heads=8, vocab_size=48, dropout=p))


def test_sequences_that_the_shards_do_not_divide() -> None:
    layer = ParallelDropout(0.5, group=Group.single(4), sequence_parallel=True)
    with pytest.raises(ValueError, match="size 6 of dim 1 cannot be split into 4 logical shards"):
        layer(torch.ones(2, 6, 8))
