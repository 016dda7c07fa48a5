"""What a logical shard sends of its part of a cross-entropy: two numbers per token, for which every rank knows whether
the shard has the token's target."""

from __future__ import annotations

import torch
from torch import Tensor


def encode(top: Tensor, exps: Tensor, target: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
    """A shard's maximum, sum of exponentials below it and target logit -> two words, ``[..., n]`` each.

    Where the target lies elsewhere (not ``owned``), the words are maximum and sum. Where it lies here, the shard has a
    log-sum-exp ``lse = top + log(exps)`` and a loss of its own, ``d = lse - target >= 0``, and the words are

        (target, d)             if d <= |lse|
        (lse, target - lse)     else, and the second is negative

    so that an offset common to all logits costs no precision. With eps of the dtype, what is decoded lies within
    ``2 eps (min(d, |lse|) + log(exps) + 1)`` of the log-sum-exp and within ``eps d`` of the target's logit. Targets of
    -inf stay so, NaN stays NaN.
    """
    log_sum = exps.log()
    lse = top + log_sum
    loss = top - target.clamp_min(torch.finfo(top.dtype).min) + log_sum
    far = loss > lse.abs()
    first = torch.where(owned, torch.where(far, lse, target), top)
    second = torch.where(owned, torch.where(far, target - lse, loss), exps)
    return first, second


def decode(first: Tensor, second: Tensor, owned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two words -> a shift, the sum of exponentials below it, and the target's logit (0 where it lies elsewhere).

    The shift is the maximum where the target lies elsewhere, else the rounded log-sum-exp; then the sum is what the
    rounding has left out: nearly 1.
    """
    start, loss = first.clamp_min(torch.finfo(first.dtype).min), second.clamp_min(0)
    lse = start + loss
    shift = torch.where(owned, lse, first)
    exps = torch.where(owned, (start - lse + loss).exp(), second)
    return shift, exps, torch.where(owned, first + second.clamp_max(0), 0)
