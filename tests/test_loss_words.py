"""The two words per token of a logical shard: how close they come, and losses and gradients made of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src.modeling.loss_words import decode_logit, decode_lse, encode
from src.testing import Ranks

from .test_loss import COLUMNS, program, whole

EPS = torch.finfo(torch.float32).eps
INF, NAN = math.inf, math.nan
OFFSETS = (0.0, 2.0**14, -(2.0**14), 2.0**20)


def drawn(seed: int, size: int = 200_000) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima of any size and sign, sums, and target logits as far below as any number or as the maximum is large."""
    generator = torch.Generator().manual_seed(seed)

    def power(low: float, high: float) -> Tensor:
        return 10 ** (low + (high - low) * torch.rand(size, dtype=torch.float64, generator=generator))

    sign = torch.randint(2, (size,), generator=generator) * 2 - 1
    exps = (1 + power(-7, 5)).float()
    cancelling = torch.rand(size, generator=generator) < 0.1
    top = torch.where(cancelling, -exps.double().log(), sign * power(-4, 37)).float()
    near, any_size = top.double().abs() * power(-8, 0.5), power(-12, 38)
    gap = torch.where(torch.rand(size, generator=generator) < 0.5, near, any_size)
    gap = gap.masked_fill(torch.rand(size, generator=generator) < 0.1, 0)
    return top, exps, torch.minimum((top - gap).float(), top)


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_precision_of_what_is_decoded(seed: int, owned: bool) -> None:
    """The bounds in the docstring of ``encode``."""
    top, exps, target = drawn(seed)
    words = encode(top, exps, target, torch.full_like(top, owned, dtype=torch.bool))
    start, rest = (term.double() for term in decode_lse(*words))
    log_sum, logit = exps.double().log(), (target if owned else top).double()
    loss, lse = (top - logit) + log_sum, top + log_sum
    error = (start - top) + (rest - log_sum)
    assert (error.abs() <= 2 * EPS * (torch.minimum(loss, lse.abs()) + log_sum + 1)).all()
    found, far = decode_logit(*words), words[1] < 0
    assert ((found - logit).abs() <= EPS * loss).all() and torch.equal(found[~far].double(), logit[~far])
    assert 0.1 < far.double().mean() < 0.9


@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_of_a_rounded_log_sum_exp_stays_small(seed: int) -> None:
    top, exps, target = drawn(seed)
    """Its exponential is taken: at most the square of the sum, rounded, however large the logits are."""
    start, rest = decode_lse(*encode(top, exps, target, torch.ones_like(top, dtype=torch.bool)))
    assert ((start - (start + rest) + rest).abs() <= 2 * exps.log() + 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinities_and_nan(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    top = torch.tensor([3.0, lowest, lowest, INF, NAN, 2.0], dtype=dtype)
    exps = torch.tensor([4.0, 20.0, 20.0, NAN, NAN, NAN], dtype=dtype)
    target = torch.tensor([-INF, -INF, lowest, INF, NAN, 1.0], dtype=dtype)
    words = encode(top, exps, target, torch.ones(6, dtype=torch.bool))
    start, rest = decode_lse(*words)
    assert torch.equal(decode_logit(*words)[:3], target[:3])
    torch.testing.assert_close((start - top + rest)[:3], exps[:3].log())  # also of a row of -inf: how many there are
    assert (start + rest).isnan()[3:].all()


def ordinary(seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Multiples of 1/8, to which 2^20 can be added, and targets in all shards."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * 8 * torch.randn(24, COLUMNS, generator=generator)).round() / 8
    return logits, torch.arange(24) * 37 % COLUMNS


def dropped() -> tuple[Tensor, Tensor]:
    """Target logits far below, with the maximum of the row in the target's eighth of the columns and in others."""
    logits, targets = ordinary(1)
    rows = torch.arange(24)
    peaks = torch.where(rows % 2 == 0, targets ^ 1, (targets + 13 * (rows // 2 % 7 + 1)) % COLUMNS)
    logits[rows, peaks] += 16
    logits[rows, targets] = torch.tensor([-1e3, -1e30, -INF]).repeat_interleave(8)
    return logits, targets


ROWS: dict[str, tuple[tuple[Tensor, Tensor], dict[str, Any]]] = {
    "ordinary": (ordinary(), {}),
    "dropped": (dropped(), {}),
    "of scale 1e4": (ordinary(2, 1e4), {}),
    "z-loss": (ordinary(3), {"z_loss": 1e-2}),
    "smoothing": (ordinary(4), {"label_smoothing": 0.1}),
    "smoothing alone": (ordinary(5), {"label_smoothing": 1.0}),
    "an empty shard": (tuple(x % 75 if x.dtype == torch.int64 else x for x in dropped()), {"vocab_size": 75}),
    "an id ignored": (ordinary(), {"ignore_index": 37}),
    "the first ignored": (dropped(), {"ignore_index": 0}),
}


def reference(logits: Tensor, targets: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Losses and their gradient in float64."""
    known = {"ignore_index": -100} | options
    vocab_size, z_loss = known.pop("vocab_size", COLUMNS), known.pop("z_loss", 0.0)
    leaf = logits.double().requires_grad_()
    rows = leaf[:, :vocab_size]
    loss = F.cross_entropy(rows, targets, reduction="none", **known)
    loss = loss + z_loss * (rows.logsumexp(-1).square() * (targets != known["ignore_index"]))
    loss.sum().backward()
    return loss.detach(), leaf.grad


def precision(logits: Tensor, targets: Tensor, num_shards: int, vocab_size: int) -> Tensor:
    """Of the log-sum-exp of a row, by what is promised of the shard that has its target."""
    real = logits.double().clone()
    real[:, vocab_size:] = -INF
    shards = real.view(len(real), num_shards, -1).logsumexp(-1)
    lse = shards.gather(1, targets[:, None] // (COLUMNS // num_shards)).squeeze(1)
    loss = lse - real.gather(1, targets[:, None]).squeeze(1)
    return 2 * EPS * (torch.minimum(loss, lse.abs()) + 2 * math.log(COLUMNS) + 2)


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("name", ROWS)
def test_losses_and_gradients_keep_their_precision(ranks: Ranks, name: str) -> None:
    (plain, targets), options = ROWS[name]
    real = options.get("vocab_size", COLUMNS)
    for offset in OFFSETS:
        logits = plain + offset
        want, want_grad = reference(logits, targets, options)
        loss, grad = whole(ranks(program, logits, targets, torch.ones(24), options | {"reduction": "none"}))
        finite, slope = want.isfinite(), 1 + 2 * options.get("z_loss", 0.0) * logits.double().logsumexp(-1).abs()
        bound = slope * precision(logits, targets, ranks.world_size, real)
        assert torch.equal(loss.isfinite(), finite) and (loss[~finite] == INF).all()
        assert ((loss - want).abs() <= bound + 2 * EPS * want)[finite].all()
        softmax = logits[:, :real].double().softmax(-1)
        assert ((grad - want_grad)[:, :real].abs() <= bound[:, None] * softmax + EPS).all()
        assert not grad[:, real:].any()


@pytest.mark.parametrize("name", ["dropped", "smoothing", "an empty shard", "an id ignored"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_same_bits_at_every_size(ranks: Ranks, name: str, offset: float) -> None:
    (logits, targets), options = ROWS[name]
    case = (logits + offset, targets, torch.ones(24), options | {"reduction": "none"})
    want = whole(ranks.on("simulated", 1)(program, *case, num_shards=8))
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]:
        got = whole(ranks.on(*place)(program, *case, num_shards=8))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), place
