"""Fewer kv heads than logical shards: shared heads against a float64 reference that repeats them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from src import Group
from src.checkpoint import load, save
from src.distributed import copy_to_shards, gather_from_region, join_shards
from src.modeling import KVParallelLinear, ModelArgs, Transformer
from src.modeling.parameters import placements
from src.training import clip_grad_norm_
from src.verification import audit_gradients, unsharded_gradients, unsharded_weights

from .conftest import OnRanks
from .places import places

IN, HEAD_DIM = 12, 4
ARGS = ModelArgs(
    dim=32, n_layers=1, n_heads=8, n_kv_heads=2, vocab_size=40, multiple_of=32, max_seq_len=8, max_batch_size=2
)


def inputs(shards: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, IN, generator=generator), torch.randn(2, 3, shards * HEAD_DIM, generator=generator)


def project(group: Group, heads: int) -> dict[str, Tensor]:
    x, grad = inputs(group.num_shards)
    x.requires_grad_()
    layer = KVParallelLinear(IN, heads, HEAD_DIM, group=group)
    y = gather_from_region(join_shards(layer.forward_shards(copy_to_shards(x, group=group))), group=group)
    y.backward(grad)
    whole = {**unsharded_weights(layer, group=group), "gradient": unsharded_gradients(layer, group=group)["weight"]}
    return {"y": y.detach(), "x": x.grad, **whole}


@places(simulated=(1, 2, 4, 8), gloo=(4,))
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("num_shards", [None, 8])
def test_values_and_gradients(place: Any, on_ranks: OnRanks, heads: int, num_shards: int | None) -> None:
    shards = num_shards or place[1]
    if shards < heads:
        with pytest.raises(Exception, match=f"n_kv_heads={heads} must divide num_shards={shards}"):
            on_ranks(place, project, heads, num_shards=num_shards)
        return
    for got in on_ranks(place, project, heads, num_shards=num_shards):
        x, grad = (t.double() for t in inputs(shards))
        weight = got["weight"].double().requires_grad_()
        repeated = weight.view(heads, HEAD_DIM, IN).repeat_interleave(shards // heads, 0).flatten(0, 1)
        y = F.linear(x.requires_grad_(), repeated)
        y.backward(grad)
        for name, want in {"y": y, "x": x.grad, "gradient": weight.grad}.items():
            torch.testing.assert_close(got[name].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_same_bits_at_every_size(on_ranks: OnRanks, heads: int) -> None:
    want = on_ranks(("simulated", 1), project, heads, num_shards=8)[0]
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 4)]:
        for got in on_ranks(place, project, heads, num_shards=8):
            assert all(torch.equal(got[name], want[name]) for name in want), place


def test_heads_draw_from_their_own_seeds() -> None:
    layer = KVParallelLinear(IN, 2, HEAD_DIM, group=Group.single(8), init_base_seed=7)
    for head, rows in enumerate(layer.weight.chunk(2)):
        generator = torch.Generator().manual_seed(7 + head)
        assert torch.equal(rows, torch.empty(HEAD_DIM, IN).uniform_(-(IN**-0.5), IN**-0.5, generator=generator))


def step(group: Group) -> tuple[Tensor, list[str], dict[str, Tensor]]:
    """Norm of the clipped gradients, what the audit finds after a step, and the new weights."""
    model = Transformer(ARGS, group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.arange(16).view(2, 8)).square().sum().backward()
    norm = clip_grad_norm_(model, 1e9, group=group)
    optimizer.step()
    return norm, audit_gradients(model, group=group), unsharded_weights(model, group=group)


def test_a_shared_head_counts_once_and_stays_equal(on_ranks: OnRanks) -> None:
    norm, _, weights = on_ranks(("simulated", 1), step, num_shards=8)[0]
    plain = Transformer(ARGS)
    with torch.no_grad():
        start = on_ranks(("simulated", 1), initial, num_shards=8)[0]
        for name, parameter in plain.named_parameters():
            parameter.copy_(start[name])
    plain(torch.arange(16).view(2, 8)).square().sum().backward()
    want = torch.stack([p.grad.square().sum() for p in plain.parameters()]).sum().sqrt()
    torch.testing.assert_close(norm, want, rtol=1e-5, atol=0)
    for world_size in (2, 8):
        for got, findings, new in on_ranks(("simulated", world_size), step, num_shards=8):
            assert torch.equal(got, norm) and findings == []
            assert all(torch.equal(new[name], weights[name]) for name in weights)


def initial(group: Group) -> dict[str, Tensor]:
    return unsharded_weights(Transformer(ARGS, group=group), group=group)


def save_model(group: Group, path: Path) -> dict[str, Tensor]:
    model = Transformer(ARGS, group=group)
    save(path, model, group=group)
    return unsharded_weights(model, group=group)


def load_model(group: Group, path: Path) -> dict[str, Tensor]:
    model = Transformer(ARGS, group=group, seed=1)
    load(path, model, group=group)
    return unsharded_weights(model, group=group)


@pytest.mark.parametrize("writers", [4, 8])
def test_checkpoints_hold_each_head_once(on_ranks: OnRanks, tmp_path: Path, writers: int) -> None:
    want = on_ranks(("simulated", writers), save_model, tmp_path / "c", num_shards=8)[0]
    dcp_to_torch_save(tmp_path / "c", tmp_path / "whole.pt")
    assert torch.load(tmp_path / "whole.pt")["model.layers.0.attention.wk.weight"].shape == (8, 32)
    for readers in (1, 2, 8):
        got = on_ranks(("simulated", readers), load_model, tmp_path / "c", num_shards=8)[0]
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_placements_of_shared_heads(on_ranks: OnRanks) -> None:
    found = on_ranks(("simulated", 8), where, num_shards=8)
    assert [offset for offset, *_ in found] == [0] * 4 + [4] * 4
    assert [size for _, size, _ in found] == [8] * 8
    assert [counted for *_, counted in found] == [[True], [False], [False], [False]] * 2


def where(group: Group) -> tuple[int, int, list[bool]]:
    model = Transformer(replace(ARGS, n_kv_heads=2), group=group)
    place = next(p for p in placements(model, group=group) if p.name.endswith("wk.weight"))
    return place.offset(group), place.size, [piece is not None for piece in place.counted(place.parameter, group)]
