"""Shared kv heads: a float64 reference that repeats them, replicas that stay equal, checkpoints without copies."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from src import Group, Ledger
from src.checkpoint import load, save
from src.modeling import KVParallelLinear, ModelArgs, Transformer, vocab_parallel_cross_entropy
from src.modeling.columns import column_products
from src.modeling.parameters import placements
from src.testing import Ranks
from src.training import clip_grad_norm_
from src.verification import unsharded_weights

SHARDS, HEAD_DIM = 8, 4
SIZES = pytest.mark.parametrize("num_heads", [1, 2])
ARGS = ModelArgs(dim=32, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=48, multiple_of=32, max_seq_len=8)
IDS, TARGETS = torch.randint(0, 48, (2, 2, 8), generator=torch.Generator().manual_seed(0))
KV = ("attention.wk.weight", "attention.wv.weight")


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def initial(head: int) -> Tensor:
    return torch.empty(HEAD_DIM, 16).uniform_(-0.25, 0.25, generator=torch.Generator().manual_seed(7 + head))


def project(group: Group, num_heads: int) -> tuple[list[tuple[str, Tensor]], int]:
    """What this rank holds of weights, outputs and gradients, by head and logical shard; and how much it sent."""
    layer = KVParallelLinear(16, num_heads, HEAD_DIM, group=group, init_base_seed=7)
    x = numbers(0, 2, 5, 16).requires_grad_()
    (outputs,) = column_products(x, [layer], group=group)
    with Ledger() as ledger:
        torch.autograd.backward(outputs, [numbers(1 + shard, 2, 5, HEAD_DIM) for shard in group.shards])
    found = [("x.grad", x.grad)]
    found += [(f"y {shard}", y.detach()) for shard, y in zip(group.shards, outputs, strict=True)]
    for kind, value in (("weight", layer.weight.detach()), ("weight.grad", layer.weight.grad)):
        pieces = value.chunk(len(layer.heads))
        found += [(f"{kind} {head}", piece.clone()) for head, piece in zip(layer.heads, pieces, strict=True)]
    return found, ledger.count("all_gather")


def merged(results: list[tuple[list[tuple[str, Tensor]], int]]) -> dict[str, Tensor]:
    """Everything once; what several ranks hold, they must hold alike."""
    out: dict[str, Tensor] = {}
    for found, _ in results:
        for name, value in found:
            assert torch.equal(out.setdefault(name, value), value), name
    return out


def reference(num_heads: int, num_shards: int) -> dict[str, Tensor]:
    x = numbers(0, 2, 5, 16).double().requires_grad_()
    heads = [initial(head).double().requires_grad_() for head in range(num_heads)]
    out = {}
    for shard in range(num_shards):
        y = x @ heads[shard * num_heads // num_shards].T
        y.backward(numbers(1 + shard, 2, 5, HEAD_DIM).double())
        out[f"y {shard}"] = y.detach()
    for head, weight in enumerate(heads):
        out |= {f"weight {head}": weight.detach(), f"weight.grad {head}": weight.grad}
    return out | {"x.grad": x.grad}


CASES = [(w, SHARDS) for w in (1, 2, 4, 8)] + [(w, None) for w in (2, 4, 6, 8)]


@SIZES
@pytest.mark.parametrize(
    "place, num_shards", [*((("simulated", w), v) for w, v in CASES), (("gloo", 4), SHARDS), (("gloo", 4), None)]
)
def test_values_and_gradients(place: Any, num_shards: int | None, ranks: Ranks, num_heads: int) -> None:
    results = ranks.on(*place)(project, num_heads, num_shards=num_shards)
    got, want = merged(results), reference(num_heads, num_shards or place[1])
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-5, msg=name)
    replicated = place[1] > num_heads
    assert [gathers for _, gathers in results] == [int(replicated)] * place[1]


def tree(terms: list[Tensor]) -> Tensor:
    half = len(terms) // 2
    return terms[0] if half == 0 else tree(terms[:half]) + tree(terms[half:])


def gradient_of_shard(shard: int, head: int) -> Tensor:
    weight = initial(head).requires_grad_()
    F.linear(numbers(0, 2, 5, 16), weight).backward(numbers(1 + shard, 2, 5, HEAD_DIM))
    return weight.grad


@SIZES
def test_gradients_are_summed_in_the_fixed_tree(ranks: Ranks, num_heads: int) -> None:
    sharers = SHARDS // num_heads
    runs = [range(head * sharers, (head + 1) * sharers) for head in range(num_heads)]
    terms = [[gradient_of_shard(shard, head) for shard in run] for head, run in enumerate(runs)]
    assert all(not torch.equal(tree(own), sum(own)) for own in terms)
    for place in [("simulated", 1), ("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 4)]:
        got = merged(ranks.on(*place)(project, num_heads, num_shards=SHARDS))
        for head, own in enumerate(terms):
            assert torch.equal(got[f"weight.grad {head}"], tree(own)), (place, head)


def test_initial_values_belong_to_heads() -> None:
    layer = KVParallelLinear(16, 2, HEAD_DIM, group=Group.single(SHARDS), init_base_seed=7)
    assert torch.equal(layer.weight, torch.cat([initial(0), initial(1)]))
    late = KVParallelLinear(16, 2, HEAD_DIM, group=Group.single(SHARDS), init_base_seed=7, device="meta")
    late.to_empty(device="cpu").reset_parameters()
    assert torch.equal(late.weight, layer.weight)


def train(group: Group, args: ModelArgs) -> dict[str, Any]:
    """Three clipped AdamW steps: weights before and after, norms, and this rank's own kv heads at the end."""
    model = Transformer(args, group=group, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first, norms = {name: weight.clone() for name, weight in unsharded_weights(model, group=group).items()}, []
    for _ in range(3):
        optimizer.zero_grad()
        vocab_parallel_cross_entropy(model(IDS), TARGETS, group=group).backward()
        norms.append(clip_grad_norm_(model, 0.1, group=group))
        optimizer.step()
    own = [(p.name, p.offset(group), p.parameter.detach()) for p in placements(model, group=group) if p.replicas > 1]
    return {"first": first, "last": unsharded_weights(model, group=group), "norms": torch.stack(norms), "own": own}


def train_plain(args: ModelArgs, first: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    model = Transformer(args, dtype=torch.float64)
    model.load_state_dict(first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(IDS).flatten(0, 1), TARGETS.flatten()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
    return dict(model.named_parameters()), torch.stack(norms).detach()


@SIZES
@pytest.mark.parametrize(
    "place, num_shards", [(("simulated", 1), 8), (("simulated", 4), 8), (("simulated", 8), None), (("gloo", 4), None)]
)
def test_training_is_that_of_a_plain_model(place: Any, num_shards: Any, ranks: Ranks, num_heads: int) -> None:
    """Above all: a shared head counts once in the norm, and its replicas stay equal."""
    args = replace(ARGS, n_kv_heads=num_heads)
    results = ranks.on(*place)(train, args, num_shards=num_shards)
    weights, norms = train_plain(args, results[0]["first"])
    replicas: dict[Any, list[Tensor]] = defaultdict(list)
    for result in results:
        torch.testing.assert_close(result["norms"], norms, rtol=1e-11, atol=0)
        torch.testing.assert_close(result["last"], {k: w.detach() for k, w in weights.items()}, rtol=1e-6, atol=1e-9)
        for name, offset, value in result["own"]:
            replicas[name, offset].append(value)
    assert {name for name, _ in replicas} == {f"layers.{i}.{name}" for i in range(2) for name in KV}
    assert all(torch.equal(copy, copies[0]) for copies in replicas.values() for copy in copies)
    assert all(len(copies) == max(place[1] // num_heads, 1) for copies in replicas.values())


def everything(model: Transformer, optimizer: torch.optim.Optimizer, group: Group) -> dict[str, Tensor]:
    """Weights and optimizer state, whole."""
    out = {}
    for place in placements(model, group=group):
        state = optimizer.state[place.parameter]
        moments = {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
        for key, value in ({"weight": place.parameter.detach()} | moments).items():
            out[f"{place.name} {key}"] = place.whole(value, group).clone()
    return out


def write(group: Group, path: Path) -> dict[str, Tensor]:
    model = Transformer(ARGS, group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(IDS).square().mean().backward()
    optimizer.step()
    save(path, model, optimizer, group=group)
    return everything(model, optimizer, group)


def read(group: Group, path: Path) -> dict[str, Tensor]:
    model = Transformer(ARGS, group=group, seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    load(path, model, optimizer, group=group)
    return everything(model, optimizer, group)


@pytest.mark.parametrize(
    "writer, num_shards", [(("simulated", 8), None), (("simulated", 8), SHARDS), (("gloo", 4), None)], ids=str
)
def test_checkpoints_hold_each_head_once(
    ranks: Ranks, tmp_path: Path, writer: tuple[str, int], num_shards: int | None
) -> None:
    saved, *others = ranks.on(*writer)(write, tmp_path / "c", num_shards=num_shards)
    for place in [("simulated", 1), ("simulated", 2), ("simulated", 8)]:
        for got in [*ranks.on(*place)(read, tmp_path / "c", num_shards=num_shards), *others]:
            assert got.keys() == saved.keys()
            assert [name for name in saved if not torch.equal(got[name], saved[name])] == [], place

    metadata = FileSystemReader(tmp_path / "c").read_metadata()
    for name in KV:
        entry = metadata.state_dict_metadata[f"model.layers.1.{name}"]
        assert entry.size == (2 * HEAD_DIM, 32)
        assert sorted((*c.offsets, *c.sizes) for c in entry.chunks) == [(0, 0, 4, 32), (4, 0, 4, 32)]
    on_disk = sum(file.stat().st_size for file in (tmp_path / "c").glob("*.distcp"))
    assert on_disk == sum(piece.length for piece in metadata.storage_data.values())


@pytest.mark.parametrize("num_heads", [3, 5])
def test_heads_that_do_not_fit(num_heads: int) -> None:
    message = rf"n_kv_heads={num_heads} must divide num_shards=8 or be a multiple of it, over world_size=1 ranks"
    with pytest.raises(ValueError, match=message):
        KVParallelLinear(16, num_heads, HEAD_DIM, group=Group.single(SHARDS))
