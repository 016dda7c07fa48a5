"""Clipping, schedule, and the training step against an unsharded float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from src import Group, Ledger
from src.modeling import ColumnParallelLinear, ModelArgs, RMSNorm, RowParallelLinear, Transformer
from src.testing import Ranks
from src.training import clip_grad_norm_, evaluate, train_step, warmup_cosine

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=8, vocab_size=52, multiple_of=32, max_seq_len=16, pad_vocab=True)


class Mixed(nn.Module):
    """One replicated and two differently sharded parameters, with gradients set by hand."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.norm = RMSNorm(16)
        self.up = ColumnParallelLinear(16, 24, group=group)
        self.down = RowParallelLinear(24, 16, group=group)
        for i, (name, parameter) in enumerate(self.named_parameters()):
            module, leaf = self.get_submodule(name.split(".")[0]), name.split(".")[1]
            dim = module.shard_dims().get(leaf) if hasattr(module, "shard_dims") else None
            shape = [n * (group.world_size if d == dim else 1) for d, n in enumerate(parameter.shape)]
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(i))
            parameter.grad = whole if dim is None else whole.chunk(group.world_size, dim)[group.rank].clone()


def clip(group: Group, max_norm: float) -> tuple[Tensor, dict[str, Tensor], int]:
    model = Mixed(group)
    with Ledger() as ledger:
        norm = clip_grad_norm_(model, max_norm, group=group)
    return norm, {name: parameter.grad for name, parameter in model.named_parameters()}, ledger.count()


@pytest.mark.ranks(1, 2, 4, gloo=(2, 4))
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_counts_everything_once(ranks: Ranks, max_norm: float) -> None:
    reference = Mixed(Group.single())
    want = math.sqrt(sum(p.grad.double().square().sum().item() for p in reference.parameters()))
    scale = min(max_norm / (want + 1e-6), 1.0)
    for norm, grads, collectives in ranks(clip, max_norm):
        assert norm.item() == pytest.approx(want, rel=1e-6)
        assert collectives == (0 if ranks.world_size == 1 else 1)
        torch.testing.assert_close(grads["norm.weight"], reference.norm.weight.grad * scale)
        torch.testing.assert_close(grads["down.bias"], reference.down.bias.grad * scale)


def test_clipping_has_the_same_bits_at_every_size(ranks: Ranks) -> None:
    want = ranks.on("simulated", 1)(clip, 0.5, num_shards=8)[0]
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]:
        for norm, grads, _ in ranks.on(*place)(clip, 0.5, num_shards=8):
            assert torch.equal(norm, want[0]), place
            assert torch.equal(grads["norm.weight"], want[1]["norm.weight"])


def test_clipping_refuses_a_norm_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="max_norm=0"):
        clip_grad_norm_(Mixed(Group.single()), 0, group=Group.single())


def batches(step: int) -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(0, ARGS.vocab_size, (2, 3, 13), generator=torch.Generator().manual_seed(step))
    return [(micro[:, :-1], micro[:, 1:]) for micro in ids]


def train(group: Group, dtype: torch.dtype = torch.float32, steps: int = 5) -> dict[str, Tensor]:
    model = Transformer(ARGS, group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    results = [train_step(model, optimizer, batches(i), group=group, dtype=dtype) for i in range(steps)]
    return {
        "losses": torch.stack([result.loss for result in results]),
        "norms": torch.stack([result.grad_norm for result in results]),
        "evaluation": torch.tensor(evaluate(model, batches(0), group=group)),
        "norm.weight": model.norm.weight.detach().clone(),
    }


@pytest.mark.ranks(2, 4, gloo=2)
def test_training_follows_the_unsharded_run(ranks: Ranks) -> None:
    want = ranks.on("simulated", 1)(train, num_shards=4)[0]
    for got in ranks(train, num_shards=4):
        for name in want:
            assert torch.equal(got[name], want[name]), name


def test_simulated_ranks_have_the_bits_of_gloo(ranks: Ranks) -> None:
    for simulated, real in zip(ranks.on("simulated", 4)(train), ranks.on("gloo", 4)(train), strict=True):
        assert all(torch.equal(simulated[name], real[name]) for name in simulated)


def test_accumulation_equals_one_large_batch() -> None:
    group = Group.single()
    whole, parts = Transformer(ARGS), Transformer(ARGS)
    (ids, targets), micro = (torch.cat(side) for side in zip(*batches(0), strict=True)), batches(0)
    results = [
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), data, group=group)
        for model, data in ((whole, [(ids, targets)]), (parts, micro))
    ]
    torch.testing.assert_close(results[0].loss, results[1].loss)
    torch.testing.assert_close(results[0].grad_norm, results[1].grad_norm, rtol=1e-4, atol=0)


def test_bfloat16_trains_on_float32_parameters(ranks: Ranks) -> None:
    narrow = ranks.on("simulated", 2)(train, torch.bfloat16, 8)[0]
    wide = ranks.on("simulated", 2)(train, torch.float32, 8)[0]
    assert narrow["norm.weight"].dtype == torch.float32
    assert not torch.equal(narrow["losses"], wide["losses"])
    torch.testing.assert_close(narrow["losses"], wide["losses"], rtol=0.02, atol=0)


def test_evaluate_refuses_no_batches() -> None:
    with pytest.raises(ValueError, match="no batches"):
        evaluate(Transformer(ARGS), [], group=Group.single())


def test_schedule() -> None:
    rates = [warmup_cosine(step, steps=100, warmup=10, peak=1.0) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert warmup_cosine(0, steps=1, warmup=0, peak=2.0) == 2.0
