"""The whole model: loss and gradients against plain torch in float64, bits at every size, seeds."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src import Group, Ledger
from src.modeling import ModelArgs, Transformer, vocab_parallel_cross_entropy
from src.testing import RankFailed, Ranks

from .test_attention import Weights, causal, state
from .test_block import draw_norms, reference_block, reference_norm
from .test_linear import whole

LENGTH = 12
SIZES: dict[str, Any] = dict(dim=32, n_layers=2, n_heads=8, multiple_of=16, max_seq_len=16, vocab_size=104)
VARIANTS = {
    "plain": ModelArgs(**SIZES),
    "gqa": ModelArgs(**SIZES, n_kv_heads=4),
    "tied": ModelArgs(**SIZES, tie_embeddings=True),
    "padded": ModelArgs(**SIZES | {"vocab_size": 99}, pad_vocab=True),
    "all": ModelArgs(**SIZES | {"vocab_size": 97}, pad_vocab=True, tie_embeddings=True, n_kv_heads=4),
}


def tokens(args: ModelArgs) -> tuple[Tensor, Tensor]:
    ids = torch.randint(args.vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    ids[0, 3] = args.vocab_size - 1
    return ids[:, :-1], ids[:, 1:]


def trained(group: Group, args: ModelArgs, dtype: torch.dtype) -> Any:
    """Weights, gradients and loss of one step, and what of them is sharded."""
    model, (ids, targets) = Transformer(args, group=group, dtype=dtype), tokens(args)
    draw_norms(model)
    options = {"vocab_size": args.vocab_size, "label_smoothing": 0.1, "z_loss": 1e-2}
    loss = vocab_parallel_cross_entropy(model(ids), targets, group=group, **options)
    loss.backward()
    out, dims = state(model)
    return out | {"loss": loss.detach()}, dims


def gathered(results: list[Any]) -> Weights:
    return whole([out for out, _ in results], results[0][1])


def reference_loss(weights: Weights, args: ModelArgs) -> Tensor:
    ids, targets = tokens(args)
    # Llama 3 defines these in float32.
    inverse = 1.0 / (args.rope_theta ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim))
    angles = torch.outer(torch.arange(LENGTH).float(), inverse)
    freqs_cis = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)
    head = weights.get("output.weight", weights["tok_embeddings.weight"])
    h = F.embedding(ids, weights["tok_embeddings.weight"])
    for i in range(args.n_layers):
        h = reference_block(weights, h, freqs_cis, causal(0, LENGTH), args, f"layers.{i}.")
    logits = F.linear(reference_norm(h, weights["norm.weight"], args.norm_eps), head)[..., : args.vocab_size]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    return loss + 1e-2 * logits.logsumexp(-1).square().mean()


@pytest.mark.ranks(1, 2, 4, gloo=(2, 4))
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(ranks: Ranks, variant: str) -> None:
    args = VARIANTS[variant]
    got = gathered(ranks(trained, args, torch.float64))
    weights = {name: got[name].clone().requires_grad_() for name in got if f"{name}.grad" in got}
    assert ("output.weight" in weights) is not args.tie_embeddings
    for name in {"tok_embeddings.weight", "output.weight"} & weights.keys():
        assert not got[name][args.vocab_size :].any()
    loss = reference_loss(weights, args)
    loss.backward()
    want = {f"{name}.grad": weight.grad for name, weight in weights.items()} | {"loss": loss.detach()}
    torch.testing.assert_close({name: got[name] for name in want}, want, rtol=1e-9, atol=1e-11)


def assert_same_bits(got: Weights, want: Weights, place: Any) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), (place, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 4])
def test_simulated_ranks_have_the_bits_of_gloo(ranks: Ranks, world_size: int, dtype: torch.dtype) -> None:
    args = VARIANTS["all"]
    simulated, gloo = (ranks.on(kind, world_size)(trained, args, dtype) for kind in ("simulated", "gloo"))
    assert simulated[0][1] == gloo[0][1]
    for (got, _), (want, _) in zip(simulated, gloo, strict=True):
        assert_same_bits(got, want, world_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "tied", "padded"])
def test_same_bits_at_every_size(ranks: Ranks, variant: str, dtype: torch.dtype) -> None:
    args = VARIANTS[variant]
    want = gathered(ranks.on("simulated", 1)(trained, args, dtype, num_shards=8))
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]:
        assert_same_bits(gathered(ranks.on(*place)(trained, args, dtype, num_shards=8)), want, place)


def test_parameters_draw_from_streams_of_their_own() -> None:
    """No two logical shards of any parameters share a seed, nor numbers up to their scale."""
    model, ratios, seeds = Transformer(VARIANTS["plain"], group=Group.single(8)), [], []
    for path, part in model.named_modules():
        if not hasattr(part, "init_base_seed"):
            continue
        seeds += [part.init_base_seed + shard for shard in range(8)]
        for shard in part.weight.detach().chunk(8, part.shard_dims()["weight"]):
            ratios.append((path, shard.flatten()[1:17] / shard.flatten()[0]))
    assert len(ratios) == len(seeds) == 8 * (2 + 7 * 2) and len(set(seeds)) == len(seeds)
    for (path, one), (other_path, other) in itertools.combinations(ratios, 2):
        assert torch.isclose(one, other).sum() < 4, (path, other_path)
    assert not torch.equal(Transformer(VARIANTS["plain"], seed=43).output.weight, model.output.weight)


def sent(group: Group) -> Counter[tuple[str, str]]:
    with Ledger() as ledger:
        trained(group, VARIANTS["all"], torch.float32)
    return Counter((record.op, record.phase) for record in ledger.records)


@pytest.mark.parametrize("num_shards", [None, 4])
def test_what_is_sent(ranks: Ranks, num_shards: int | None) -> None:
    """Two all-reduces a block and way; one for the embedding; one for the head's input; one gather for the loss."""
    want = {("all_reduce", "forward"): 2 * 2 + 1, ("all_gather", "forward"): 1, ("all_reduce", "backward"): 2 * 2 + 1}
    assert ranks.on("simulated", 2)(sent, num_shards=num_shards) == [want, want]


def unsharded(group: Group) -> Any:
    model, (ids, _) = Transformer(VARIANTS["plain"]), tokens(VARIANTS["plain"])
    with Ledger() as ledger:
        logits = model(ids)
        logits.sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}, ledger.count()


@pytest.mark.ranks(2)
def test_no_group_means_unsharded_inside_a_job(ranks: Ranks) -> None:
    alone, grads, _ = unsharded(Group.single())
    assert alone.shape == (2, LENGTH, 104)
    for logits, rank_grads, count in ranks(unsharded):
        assert torch.equal(logits, alone) and count == 0
        assert_same_bits(rank_grads, grads, ranks)


def copied(group: Group) -> tuple[Tensor, ...]:
    model, (ids, _) = Transformer(VARIANTS["tied"], group=group), tokens(VARIANTS["tied"])
    before, twin = model(ids), copy.deepcopy(model)
    assert twin.group is model.group and twin.output.weight is twin.tok_embeddings.weight
    with torch.no_grad():
        model.norm.weight.zero_()
    return before.detach(), model(ids).detach(), twin(ids).detach()


def test_deepcopy(ranks: Ranks) -> None:
    for before, zeroed, twin in ranks.on("simulated", 2)(copied):
        assert torch.equal(twin, before) and before.any() and not zeroed.any()


def test_bfloat16_keeps_the_frequencies() -> None:
    model, (ids, _) = Transformer(VARIANTS["plain"]), tokens(VARIANTS["plain"])
    table = model.frequencies.inverse.clone()
    logits = model.to(torch.bfloat16)(ids)
    assert logits.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.frequencies.inverse, table) and table.dtype == torch.float32
    assert not any("freqs" in name or "cache" in name for name in model.state_dict())


def materialised(group: Group, args: ModelArgs) -> tuple[Weights, Weights]:
    model = Transformer(args, group=group, device="meta").to_empty(device="cpu")
    model.reset_parameters()
    ids, _ = tokens(args)
    ready = Transformer(args, group=group)
    return [dict(m.named_parameters()) | {"logits": m(ids).detach()} for m in (model, ready)]


@pytest.mark.parametrize("variant", ["padded", "all"])
def test_a_model_built_on_the_meta_device(ranks: Ranks, variant: str) -> None:
    for model, ready in ranks.on("simulated", 2)(materialised, VARIANTS[variant]):
        assert model.keys() == ready.keys()
        assert all(torch.equal(model[name], ready[name]) for name in ready)


def decoded(group: Group, lengths: list[int]) -> tuple[Tensor, Tensor]:
    model, (ids, _) = Transformer(VARIANTS["gqa"], group=group, dtype=torch.float64), tokens(VARIANTS["gqa"])
    ends = list(itertools.accumulate(lengths))
    with torch.no_grad():
        parts = [model(ids[:, end - n : end], end - n) for n, end in zip(lengths, ends, strict=True)]
    return model(ids).detach(), torch.cat(parts, 1)


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("lengths", [[1] * LENGTH, [4, 3, 1, 4]], ids=["tokens", "runs"])
def test_decoding_gives_the_logits_of_the_full_forward(ranks: Ranks, lengths: list[int]) -> None:
    for full, cached in ranks(decoded, lengths):
        torch.testing.assert_close(cached, full, rtol=1e-10, atol=1e-11)


def build_and_run(group: Group, options: dict[str, Any], value: int, start_pos: int) -> None:
    Transformer(ModelArgs(**SIZES | options), group=group)(torch.tensor([[1, 2, value]]), start_pos)


@pytest.mark.parametrize("world_size", [1, 2])
def test_errors_at_every_size(ranks: Ranks, world_size: int) -> None:
    for options, value, start_pos, message in [
        ({"vocab_size": -1}, 0, 0, r"vocab_size=-1: set it in ModelArgs"),
        ({}, 104, 0, r"ids: value 104 at position \(0, 2\) on rank 0 is outside \[0, 104\)"),
        ({}, -1, 0, r"ids: value -1 at position \(0, 2\) on rank 0"),
        ({}, 0, 14, r"start_pos=14 \+ 3 positions must lie in \[0, max_seq_len=16\]"),
        ({}, 0, -1, r"start_pos=-1 \+ 3 positions"),
        ({"vocab_size": 98, "pad_vocab": True}, 99, 0, r"ids: value 99 .* outside \[0, 98\)"),
    ]:
        with pytest.raises(RankFailed, match=message):
            ranks.on("simulated", world_size)(build_and_run, options, value, start_pos)


def test_errors_of_sizes() -> None:
    with pytest.raises(
        ValueError, match=r"vocab_size=97 cannot be sharded over num_shards=4 .*; pass pad_vocab=True to pad it to 100"
    ):
        Transformer(ModelArgs(**SIZES | {"vocab_size": 97}), group=Group.single(4))
    with pytest.raises(ValueError, match=r"n_heads=5 must divide dim=32"):
        ModelArgs(dim=32, n_heads=5)
    with pytest.raises(ValueError, match=r"head_dim=1 \(dim=32 / n_heads=32\) must be even"):
        ModelArgs(dim=32, n_heads=32)
    with pytest.raises(ValueError, match=r"n_kv_heads=3 must divide n_heads=8"):
        ModelArgs(dim=32, n_heads=8, n_kv_heads=3)
