"""The two numbers per token that a logical shard sends of its part of a cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor


def encode(top: Tensor, exps: Tensor, target: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of a shard's logits, sum of exponentials below it, and target logit -> two words, all ``[n]``.

    With ``lse = top + log(exps)`` and ``logit`` the target's where the shard has it (``owned``), else the maximum:

        (logit, lse - logit)     if lse - logit <= |lse|
        (lse, logit - lse)       else, and the second is negative

    so that an offset common to all logits costs no precision. With eps of the dtype, the log-sum-exp that is decoded
    lies within ``2 eps (min(lse - logit, |lse|) + log(exps) + 1)`` of ``lse``, and the logit within
    ``eps (lse - logit)``. A logit of -inf stays so, NaN stays NaN.
    """
    log_sum = exps.log()
    lse, logit = top + log_sum, torch.where(owned, target, top)
    loss = top - logit.clamp_min(torch.finfo(top.dtype).min) + log_sum
    far = loss > lse.abs()
    return torch.where(far, lse, logit), torch.where(far, logit - lse, loss)


def decode_lse(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp in two terms: take what is close to it from the first, then add the second."""
    return first.clamp_min(torch.finfo(first.dtype).min), second.clamp_min(0)


def decode_logit(first: Tensor, second: Tensor) -> Tensor:
    """Logit of the target, or the maximum where it lies elsewhere."""
    return first + second.clamp_max(0)
