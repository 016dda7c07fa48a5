"""Sequence parallelism: the results of the mode off, other collectives, and gradients that are summed all the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import Group, Ledger
from src.generation import generate
from src.modeling import (
    ColumnParallelLinear,
    FeedForward,
    LMHead,
    ModelArgs,
    ParallelVocabEmbedding,
    RMSNorm,
    RowParallelLinear,
    Transformer,
    TransformerBlock,
    precompute_freqs_cis,
    vocab_parallel_cross_entropy,
)
from src.testing import RankFailed, Ranks
from src.verification import unsharded_gradients

from .test_block import draw_norms

LENGTH, DIM = 16, 32
ARGS = ModelArgs(
    dim=DIM, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=51, multiple_of=32, max_seq_len=16, pad_vocab=True
)
IDS, TARGETS = torch.randint(0, 51, (2, 3, LENGTH), generator=torch.Generator().manual_seed(0))


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cut(x: Tensor, dim: int | None, group: Group) -> Tensor:
    return x if dim is None else x.chunk(group.world_size, dim)[group.rank].contiguous()


def transformer(group: Group, sequence_parallel: bool, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(ARGS, group=group, sequence_parallel=sequence_parallel, dtype=dtype)
    draw_norms(model)
    return model


def trained(group: Group, dtype: torch.dtype, sequence_parallel: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss and whole gradients; and the norms' gradients as this rank has them."""
    model = transformer(group, sequence_parallel, dtype)
    loss = vocab_parallel_cross_entropy(model(IDS), TARGETS, group=group, vocab_size=51)
    loss.backward()
    norms = {name: p.grad for name, p in model.named_parameters() if "norm" in name}
    return {"loss": loss.detach()} | unsharded_gradients(model, group=group), norms


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 8])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_loss_and_gradients_are_those_of_the_mode_off(
    ranks: Ranks, num_shards: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    (want, _), *_ = ranks(trained, dtype, False, num_shards=num_shards)
    results = ranks(trained, dtype, True, num_shards=num_shards)
    _, norms = results[0]
    assert len(norms) == 2 * ARGS.n_layers + 1 and all(gradient.any() for gradient in norms.values())
    for got, own_norms in results:
        torch.testing.assert_close(got, want, rtol=100 * tolerance, atol=tolerance)
        assert [name for name in norms if not torch.equal(own_norms[name], norms[name])] == []


def sent_by_block(group: Group) -> list[tuple[str, str, tuple[int, ...]]]:
    block = TransformerBlock(0, ARGS, group=group, sequence_parallel=True)
    x = cut(numbers(0, 3, LENGTH, DIM), 1, group).requires_grad_()
    with Ledger() as ledger:
        block(x, 0, precompute_freqs_cis(DIM // 8, LENGTH)).sum().backward()
    return [(record.op, record.phase, record.shape) for record in ledger.records]


@pytest.mark.ranks(2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 8])
def test_what_a_block_sends(ranks: Ranks, num_shards: int | None) -> None:
    """Activations by two gathers and two scatters each way. The only all-reduces are those of the norms' gradients."""
    whole, cut = (3, LENGTH, DIM), (3, LENGTH // ranks.world_size, DIM)
    way = [("all_gather", cut), ("reduce_scatter", whole)] * 2
    for records in ranks(sent_by_block, num_shards=num_shards):
        assert [(op, shape) for op, phase, shape in records if phase == "forward"] == way
        backward = [(op, shape) for op, phase, shape in records if phase == "backward"]
        assert [record for record in backward if record[0] != "all_reduce"] == way
        assert [shape for op, shape in backward if op == "all_reduce"] == [(DIM,)] * 2


def sent_by_model(group: Group) -> Counter[tuple[str, str]]:
    with Ledger() as ledger:
        transformer(group, sequence_parallel=True)(IDS).sum().backward()
    return Counter((record.op, record.phase) for record in ledger.records)


@pytest.mark.parametrize("num_shards", [None, 8])
def test_what_a_model_sends(ranks: Ranks, num_shards: int | None) -> None:
    """Two of each way and block, one for the embedding or the head, and the gradients of the norms."""
    ops = [(op, phase) for op in ("all_gather", "reduce_scatter") for phase in ("forward", "backward")]
    want = dict.fromkeys(ops, 2 * ARGS.n_layers + 1) | {("all_reduce", "backward"): 2 * ARGS.n_layers + 1}
    assert ranks.on("simulated", 4)(sent_by_model, num_shards=num_shards) == [want] * 4


@dataclass(frozen=True)
class Case:
    """A layer, the shapes of its whole input and output, and the sharded dim of either (None: replicated)."""

    build: Callable[..., nn.Module]
    input: tuple[int, ...]
    in_dim: int | None
    output: tuple[int, ...]
    out_dim: int | None


def embedding(group: Group, sequence_parallel: bool) -> nn.Module:
    return ParallelVocabEmbedding(48, DIM, process_group=group, sequence_parallel=sequence_parallel)


NARROW, WIDE = (3, LENGTH, DIM), (3, LENGTH, 48)
CASES = {
    "column": Case(partial(ColumnParallelLinear, DIM, 48), NARROW, 1, WIDE, 2),
    "gathered column": Case(partial(ColumnParallelLinear, DIM, 48, gather_output=True), NARROW, 1, WIDE, None),
    "row": Case(partial(RowParallelLinear, 48, DIM), WIDE, 2, NARROW, 1),
    "cutting row": Case(partial(RowParallelLinear, 48, DIM, input_is_parallel=False), WIDE, None, NARROW, 1),
    "norm": Case(partial(RMSNorm, DIM), NARROW, 1, NARROW, 1),
    "head": Case(partial(LMHead, DIM, 48), NARROW, 1, WIDE, 2),
    "embedding": Case(embedding, (3, LENGTH), None, NARROW, 1),
}


def example(kind: str) -> Tensor:
    return IDS % 48 if kind == "embedding" else numbers(0, *CASES[kind].input)


def run_layer(group: Group, kind: str) -> dict[str, tuple[int | None, Tensor]]:
    """Values and gradients of this rank, each with its sharded dim."""
    case = CASES[kind]
    module = case.build(group=group, sequence_parallel=True)
    dims = module.shard_dims() if hasattr(module, "shard_dims") else {}
    x = cut(example(kind), case.in_dim, group)
    y = module(x.requires_grad_(x.is_floating_point()))
    y.backward(cut(numbers(1, *case.output), case.out_dim, group))
    out = {"y": (case.out_dim, y.detach())} | ({"x.grad": (case.in_dim, x.grad)} if x.requires_grad else {})
    for name, parameter in module.named_parameters():
        out |= {name: (dims.get(name), parameter.detach()), f"{name}.grad": (dims.get(name), parameter.grad)}
    return out


def reference(kind: str, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    x, leaves = example(kind), {"weight": weight.double().requires_grad_()}
    if kind != "embedding":
        x = leaves["x"] = x.double().requires_grad_()
    if bias is not None:
        leaves["bias"] = bias.double().requires_grad_()
    if kind == "embedding":
        y = F.embedding(x, leaves["weight"])
    elif kind == "norm":
        y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * leaves["weight"]
    else:
        y = F.linear(x, leaves["weight"], leaves.get("bias"))
    y.backward(numbers(1, *CASES[kind].output).double())
    return {"y": y.detach()} | {f"{name}.grad": leaf.grad for name, leaf in leaves.items()}


def gathered(results: list[dict[str, tuple[int | None, Tensor]]]) -> dict[str, Tensor]:
    """The whole tensors; replicated ones must be equal on all ranks."""
    out = {}
    for name, (dim, first) in results[0].items():
        parts = [result[name][1] for result in results]
        assert dim is not None or all(torch.equal(value, first) for value in parts), name
        out[name] = first if dim is None else torch.cat(parts, dim)
    return out


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("kind", CASES)
def test_layers(ranks: Ranks, kind: str) -> None:
    got = gathered(ranks(run_layer, kind))
    want = reference(kind, got.pop("weight"), got.pop("bias", None))
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-5, msg=f"{kind} {name}")


def norm_of_a_sum(group: Group, fused: bool) -> dict[str, tuple[int | None, Tensor]]:
    norm = RMSNorm(DIM, group=group, sequence_parallel=True)
    x, residual, grad = (cut(numbers(i, *NARROW), 1, group) for i in range(3))
    total = x.requires_grad_() + residual
    y, total = norm(x, residual) if fused else (norm(total), total)
    torch.autograd.backward((y, total), (grad, 2 * grad))
    parts = {"y": y.detach(), "total": total.detach(), "x.grad": x.grad}
    return {name: (1, part) for name, part in parts.items()} | {"weight.grad": (None, norm.weight.grad)}


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 8])
def test_norm_of_a_sum_has_the_bits_of_both_apart(ranks: Ranks, num_shards: int | None) -> None:
    got, want = (gathered(ranks(norm_of_a_sum, fused, num_shards=num_shards)) for fused in (True, False))
    assert want.keys() == got.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", CASES)
def test_layers_have_the_same_bits_at_every_size(ranks: Ranks, kind: str) -> None:
    want = gathered(ranks.on("simulated", 1)(run_layer, kind, num_shards=8))
    for name, value in reference(kind, want["weight"], want.get("bias")).items():
        torch.testing.assert_close(want[name].double(), value, rtol=1e-5, atol=1e-5, msg=f"{kind} {name}")
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]:
        got = gathered(ranks.on(*place)(run_layer, kind, num_shards=8))
        assert [name for name in want if not torch.equal(got[name], want[name])] == [], place


def generated(group: Group, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    """Greedy text of a prompt that no group can cut, and the loss of whole sequences afterwards."""
    model = transformer(group, sequence_parallel)
    before = flags(model)
    text = torch.stack(list(generate(model, IDS[:, :5], 9)), 1)
    assert flags(model) == before
    return text, vocab_parallel_cross_entropy(model(IDS), TARGETS, group=group, vocab_size=51).detach()


def flags(model: Transformer) -> dict[str, bool]:
    return {
        name: module.sequence_parallel for name, module in model.named_modules() if hasattr(module, "sequence_parallel")
    }


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 8])
def test_generation_is_that_of_the_mode_off(ranks: Ranks, num_shards: int | None) -> None:
    (want, loss), *_ = ranks(generated, False, num_shards=num_shards)
    assert len(want.unique()) > 3
    for text, later in ranks(generated, True, num_shards=num_shards):
        assert torch.equal(text, want)
        torch.testing.assert_close(later, loss, rtol=1e-6, atol=0)


def interrupted(group: Group) -> None:
    model = transformer(group, sequence_parallel=True)
    before = flags(model)
    assert any(before.values()) and not before["layers.0.attention.wq"]
    with pytest.raises(KeyboardInterrupt), model.evaluating(whole_sequences=True):
        assert not any(flags(model).values())
        assert not model.training and not torch.is_grad_enabled()
        raise KeyboardInterrupt
    assert flags(model) == before and model.training and torch.is_grad_enabled()
    with model.evaluating():
        assert flags(model) == before and not model.training


def test_whole_sequences_end_with_the_block_also_after_an_exception(ranks: Ranks) -> None:
    ranks.on("simulated", 2)(interrupted)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "model": partial(Transformer, ARGS),
    "feed forward": partial(FeedForward, DIM, 4 * DIM, 32),
    "column": partial(ColumnParallelLinear, DIM, 48),
    "row": partial(RowParallelLinear, DIM, 48, bias=False, input_is_parallel=False),
    "embedding": embedding,
    "norm": partial(RMSNorm, DIM),
}


def apply(group: Group, kind: str, shape: tuple[int, ...]) -> None:
    ids = kind in ("model", "embedding")
    LAYERS[kind](group=group, sequence_parallel=True)(torch.zeros(shape, dtype=torch.long if ids else torch.float32))


@pytest.mark.parametrize(
    "kind, shape, num_shards, message",
    [
        ("model", (1, 12), 8, "sequence_parallel: num_shards=8 must divide the sequence length 12"),
        ("model", (1, 7), None, "sequence_parallel: num_shards=2 must divide the sequence length 7"),
        ("row", (1, 7, DIM), None, "size 7 of dim 1 is not divisible by world_size=2"),
        ("embedding", (1, 7), None, "size 7 of dim 1 is not divisible by world_size=2"),
        ("norm", (1, 6, DIM), 8, "size 6 of dim 1 cannot be split into 4 logical shards"),
    ],
)
def test_lengths_that_the_shards_do_not_divide(
    ranks: Ranks, kind: str, shape: tuple[int, ...], num_shards: int | None, message: str
) -> None:
    with pytest.raises(RankFailed, match=message):
        ranks.on("simulated", 2)(apply, kind, shape, num_shards=num_shards)


@pytest.mark.parametrize("kind", ["feed forward", "column", "row", "embedding", "norm"])
def test_inputs_without_a_sequence_dim(ranks: Ranks, kind: str) -> None:
    """Dim 1 is what is cut: without this error it would be the features."""
    shape = (8,) if kind == "embedding" else (8, DIM)
    with pytest.raises(RankFailed, match=r"ValueError: .*" + re.escape(f"got a tensor of shape {list(shape)}")):
        ranks.on("simulated", 2)(apply, kind, shape, num_shards=8)
