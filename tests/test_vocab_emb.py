"""Vocabulary embeddings, whole and sharded, against the dense table: values, gradients, bits and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from src import Group, Ledger
from src.modeling import ParallelVocabEmbedding, VocabEmbedding
from src.testing import Ranks

VOCAB, EMB = 24, 3
IDS = torch.tensor([[0, 5, 6, 23, 5], [11, 12, 17, 18, 5]])


def drawn(seed: int, rows: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.init.normal_(torch.empty(rows, EMB, dtype=dtype), mean, std)


def dense(num_shards: int, rows: int = VOCAB, base: int = 42) -> Tensor:
    """The whole table: logical shard j draws from ``base + j``."""
    return torch.cat([drawn(base + j, rows // num_shards) for j in range(num_shards)])


def whole_numbers() -> Tensor:
    """Gradients whose sums are exact in every order."""
    return torch.randint(-8, 9, (*IDS.shape, EMB), generator=torch.Generator().manual_seed(0)).float()


def scattered(grad: Tensor, ids: Tensor = IDS, rows: int = VOCAB) -> Tensor:
    """The dense gradient of the table, one occurrence of an id at a time."""
    total = torch.zeros(rows, EMB)
    for word, row in zip(ids.flatten().tolist(), grad.view(-1, EMB), strict=True):
        total[word] += row
    return total


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_vocab_embedding(dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    layer = VocabEmbedding(VOCAB, EMB, 0.5, 2.0, 9, table_dtype, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer.weight, drawn(9, VOCAB, 0.5, 2.0, table_dtype))
    ids, grad = IDS.to(dtype), whole_numbers().to(table_dtype)
    before = ids.clone()
    out = layer(ids)
    out.backward(grad)
    assert torch.equal(out, layer.weight[IDS]) and out.dtype == table_dtype
    assert torch.equal(layer.weight.grad, scattered(grad.float()).to(table_dtype))
    assert torch.equal(ids, before)


def test_default_seeds_and_distribution() -> None:
    assert torch.equal(VocabEmbedding(VOCAB, EMB).weight, drawn(42, VOCAB))
    assert torch.equal(ParallelVocabEmbedding(VOCAB, EMB).weight, drawn(42, VOCAB))


@pytest.mark.parametrize("num_shards", [None, 8])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_simulated_ranks(world_size: int, num_shards: int | None, dtype: torch.dtype) -> None:
    table, grad, ids = dense(num_shards or world_size), whole_numbers(), IDS.to(dtype)
    state, total, grads = torch.get_rng_state(), torch.zeros(*IDS.shape, EMB), []
    for rank in range(world_size):
        layer = ParallelVocabEmbedding(VOCAB, EMB, rank, world_size, num_shards=num_shards)
        assert layer.shard_dims() == ({} if (num_shards or world_size) == 1 else {"weight": 0})
        assert torch.equal(layer.weight, table.chunk(world_size)[rank])
        partial = layer(ids)
        partial.backward(grad)
        owned = IDS // (VOCAB // world_size) == rank
        assert torch.equal(partial[owned], table[IDS[owned]]) and not partial[~owned].any()
        total += partial.detach()
        grads.append(layer.weight.grad)
    assert torch.equal(total, table[IDS])
    assert torch.equal(torch.cat(grads), scattered(grad))
    assert torch.equal(ids, IDS) and torch.equal(torch.get_rng_state(), state)


def test_initial_values_follow_mean_std_seed_and_dtype() -> None:
    layer = ParallelVocabEmbedding(VOCAB, EMB, 1, 2, None, 0.5, 2.0, 7, torch.bfloat16, "cpu")
    assert torch.equal(layer.weight, drawn(7 + 1, VOCAB // 2, 0.5, 2.0, torch.bfloat16))


@pytest.mark.parametrize(
    "make", [VocabEmbedding, lambda *a, **k: ParallelVocabEmbedding(*a, rank=1, world_size=2, **k)]
)
def test_meta_device(make: Any) -> None:
    layer = make(VOCAB, EMB, device="meta")
    assert layer.weight.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.weight, make(VOCAB, EMB).weight)


def embedded(group: Group, ids: Tensor, grad: Tensor, vocab_size: int = VOCAB) -> dict[str, Any]:
    layer = ParallelVocabEmbedding(vocab_size, EMB, process_group=group, pad_vocab=vocab_size != VOCAB)
    before = ids.clone()
    with Ledger() as ledger:
        out = layer(ids)
        out.backward(grad)
    calls = [(record.op, record.phase) for record in ledger.records]
    assert torch.equal(ids, before)
    return {"out": out.detach(), "weight": layer.weight.detach(), "grad": layer.weight.grad, "calls": calls}


@pytest.mark.ranks(1, 2, 4, gloo=(2, 4))
@pytest.mark.parametrize("num_shards", [None, 8])
def test_group_mode(ranks: Ranks, num_shards: int | None) -> None:
    table, grad = dense(num_shards or ranks.world_size), whole_numbers()
    results = ranks(embedded, IDS, grad, num_shards=num_shards)
    assert all(torch.equal(result["out"], table[IDS]) for result in results)
    assert torch.equal(torch.cat([result["weight"] for result in results]), table)
    assert torch.equal(torch.cat([result["grad"] for result in results]), scattered(grad))
    assert all(result["calls"] == [("all_reduce", "forward")] * (ranks.world_size > 1) for result in results)


def test_same_bits_at_every_size(ranks: Ranks) -> None:
    grad = torch.randn(*IDS.shape, EMB, generator=torch.Generator().manual_seed(1))
    bits = []
    for place in [("simulated", 1), ("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]:
        results = ranks.on(*place)(embedded, IDS, grad, num_shards=8)
        whole = [torch.cat([result[name] for result in results]) for name in ("weight", "grad")]
        bits.append([results[0]["out"], *whole])
    assert all(torch.equal(a, b) for other in bits for a, b in zip(bits[0], other, strict=True))


def placed(group: Group, form: str) -> tuple[int, int, Tensor]:
    rank, n = group.rank, group.world_size
    mesh = init_device_mesh("cpu", (n,)) if form == "mesh" else None
    given = {
        "default": {},
        "group": {"process_group": group},
        "pg": {"process_group": group.pg},
        "mesh": {"process_group": mesh},
        "agreeing": {"rank": rank, "world_size": n, "process_group": group.pg},
        "rank-alone": {"rank": rank, "world_size": n},
    }[form]
    layer = ParallelVocabEmbedding(VOCAB, EMB, **given)
    return layer.rank, layer.world_size, layer(IDS).detach()


@pytest.mark.ranks(2, 4, gloo=2)
@pytest.mark.parametrize("form", ["default", "group", "pg", "mesh", "agreeing", "rank-alone"])
def test_process_group_forms(ranks: Ranks, form: str) -> None:
    results, want = ranks(placed, form), dense(ranks.world_size)[IDS]
    assert [result[:2] for result in results] == [(rank, ranks.world_size) for rank in range(ranks.world_size)]
    partial = [out for _, _, out in results]
    if form == "rank-alone":
        assert not torch.equal(partial[0], want) and torch.equal(torch.stack(partial).sum(0), want)
    else:
        assert all(torch.equal(out, want) for out in partial)


def in_subgroup(group: Group) -> tuple[int, int, Tensor, str]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = ParallelVocabEmbedding(
        VOCAB, EMB, process_group=pairs[group.rank // 2], init_base_seed=10 * (group.rank // 2)
    )
    with pytest.raises(ValueError) as info:
        ParallelVocabEmbedding(VOCAB, EMB, process_group=pairs[1 - group.rank // 2])
    return layer.rank, layer.world_size, layer(IDS).detach(), str(info.value)


@pytest.mark.ranks(4)
def test_subgroups(ranks: Ranks) -> None:
    for global_rank, (rank, world_size, out, refusal) in enumerate(ranks(in_subgroup)):
        assert (rank, world_size) == (global_rank % 2, 2)
        assert torch.equal(out, dense(2, base=10 * (global_rank // 2))[IDS])
        assert f"rank={global_rank} of the default group is not a member" in refusal


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_rows_of_infinity_do_not_leak(value: float) -> None:
    for rank in range(2):
        layer = ParallelVocabEmbedding(VOCAB, EMB, rank, 2)
        with torch.no_grad():
            layer.weight[0] = layer.weight[-1] = value
        mine, foreign = (torch.arange(VOCAB).chunk(2)[r] for r in (rank, 1 - rank))
        out = layer(torch.cat([foreign, mine]))
        assert not out[: VOCAB // 2].any() and torch.equal(out[VOCAB // 2 :].nan_to_num(7), layer.weight.nan_to_num(7))
        out[: VOCAB // 2].backward(torch.full((VOCAB // 2, EMB), value))
        assert not layer.weight.grad.any()


@pytest.mark.parametrize("vocab_size", [17, 21, 25])
def test_padded_vocabulary(ranks: Ranks, vocab_size: int) -> None:
    """17 words on 8 ranks of 3 rows: two ranks hold padding alone."""
    ids, rows = torch.arange(vocab_size), -(-vocab_size // 8) * 8
    grad = torch.arange(1.0, vocab_size * EMB + 1).view(vocab_size, EMB)
    table = dense(8, rows)
    table[vocab_size:] = 0
    for place in [("simulated", 1), ("simulated", 2), ("simulated", 8), ("gloo", 2)]:
        results = ranks.on(*place)(embedded, ids, grad, vocab_size, num_shards=8)
        assert torch.equal(torch.cat([result["weight"] for result in results]), table)
        assert torch.equal(torch.cat([result["grad"] for result in results]), scattered(grad, ids, rows))
        assert all(torch.equal(result["out"], table[:vocab_size]) for result in results)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((8, EMB, 1), {}, "rank=1 and world_size=None: give both"),
        ((8, EMB, None, 2), {}, "rank=None and world_size=2: give both"),
        ((8, EMB, 4, 4), {}, r"rank=4 is outside \[0, world_size=4\)"),
        ((8, EMB, -1, 4), {}, r"rank=-1 is outside \[0, world_size=4\)"),
        ((8, EMB, 0, 0), {}, "world_size=0 must be at least 1"),
        ((50257, 1, 0, 4), {}, "vocab_size=50257 cannot be sharded over world_size=4 ranks; .*pad it to 50260"),
        ((10, EMB, 0, 2), {"num_shards": 4}, r"vocab_size=10 .* num_shards=4 .*world_size=2 .*pad it to 12"),
        ((8, EMB, 0, 4), {"num_shards": 6}, "num_shards=6 must equal world_size=4"),
        ((12, EMB, 0, 2), {"num_shards": 6}, "num_shards=6 must equal world_size="),
        ((8, EMB, 0, 2), {"num_shards": 0}, "num_shards=0 must equal world_size=2"),
        ((8, EMB), {"process_group": Group.single(4), "num_shards": 2}, "num_shards=2 differs from num_shards=4"),
        ((8, EMB, 1, 2, Group.single()), {}, r"rank=1, world_size=2 disagree .* rank=0, world_size=1"),
        ((8, EMB, 0, 2, Group.single()), {}, r"rank=0, world_size=2 disagree .* rank=0, world_size=1"),
    ],
)
def test_arguments_that_do_not_fit(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelVocabEmbedding(*arguments, **options)


def test_rank_that_contradicts_a_process_group(ranks: Ranks) -> None:
    def swapped(group: Group) -> None:
        with pytest.raises(ValueError, match=f"rank={1 - group.rank}, world_size=2 disagree .* rank={group.rank}"):
            ParallelVocabEmbedding(8, EMB, 1 - group.rank, 2, group.pg)

    ranks.on("simulated", 2)(swapped)


def refused(group: Group, mode: str, ids: Tensor, vocab_size: int) -> tuple[str, str]:
    given = {"rank": group.rank, "world_size": group.world_size} if mode == "rank" else {"process_group": group}
    layer = ParallelVocabEmbedding(vocab_size, EMB, **given, pad_vocab=True)
    with pytest.raises((TypeError, ValueError)) as info:
        layer(ids)
    return info.type.__name__, str(info.value)


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("mode", ["group", "rank"])
@pytest.mark.parametrize("vocab_size, value", [(24, 24), (24, -1), (21, 22), (24, 2**31 - 1)])
def test_ids_out_of_range(ranks: Ranks, mode: str, vocab_size: int, value: int) -> None:
    ids = torch.tensor([[0, 1], [value, 2]], dtype=torch.int32)
    for rank, (kind, message) in enumerate(ranks(refused, mode, ids, vocab_size)):
        assert kind == "ValueError"
        assert f"value {value} at position (1, 0) on rank {rank} is outside [0, {vocab_size})" in message


@pytest.mark.ranks(1, 2, gloo=())
@pytest.mark.parametrize("mode", ["group", "rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_of_another_type(ranks: Ranks, mode: str, dtype: torch.dtype) -> None:
    for kind, message in ranks(refused, mode, torch.ones(2, 2, dtype=dtype), VOCAB):
        assert (kind, message) == ("TypeError", f"ids must be int32 or int64, not {dtype}; convert them with .long()")


def test_ids_refused_by_the_whole_table() -> None:
    layer = VocabEmbedding(VOCAB, EMB)
    with pytest.raises(ValueError, match=r"value 24 at position \(1,\) on rank 0 is outside \[0, 24\)"):
        layer(torch.tensor([0, 24]))
    with pytest.raises(TypeError, match=r"int32 or int64, not torch.float32"):
        layer(torch.zeros(2))
