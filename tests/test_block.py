"""TransformerBlock: pre-norm residuals around attention and feed-forward, and what it sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src import Group, Ledger
from src.modeling import ModelArgs, TransformerBlock
from src.testing import Ranks

from .test_attention import Weights, causal, check_against, freqs, inputs, reference_attention, traced
from .test_mlp import reference_mlp

ARGS = ModelArgs(dim=32, n_heads=8, multiple_of=16, ffn_dim_multiplier=1.1, norm_eps=1e-2)


def reference_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def reference_block(
    weights: Weights, x: Tensor, freqs_cis: Tensor, mask: Tensor | None, args: ModelArgs, prefix: str = ""
) -> Tensor:
    normed = reference_norm(x, weights[f"{prefix}attention_norm.weight"], args.norm_eps)
    h = x + reference_attention(weights, normed, freqs_cis, mask, args, f"{prefix}attention.")
    normed = reference_norm(h, weights[f"{prefix}ffn_norm.weight"], args.norm_eps)
    return h + reference_mlp(weights, normed, f"{prefix}feed_forward.")


def draw_norms(module: nn.Module) -> None:
    """Norm weights other than ones, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, -1, 1, generator=generator)


def forward_backward(group: Group, mask: Tensor | None) -> Any:
    block = TransformerBlock(1, ARGS, group=group, dtype=torch.float64)
    draw_norms(block)
    return traced(block, 0, freqs(), mask)


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 4])
@pytest.mark.parametrize("mask", [None, causal()], ids=["full", "causal"])
def test_values_and_gradients(ranks: Ranks, num_shards: int | None, mask: Tensor | None) -> None:
    results = ranks(forward_backward, mask, num_shards=num_shards)
    check_against(lambda weights, x: reference_block(weights, x, freqs(), mask, ARGS), results)


def sent(group: Group) -> list[tuple[str, str, int]]:
    with Ledger() as ledger:
        forward_backward(group, causal())
    return [(record.op, record.phase, record.payload_bytes) for record in ledger.records]


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 8])
def test_two_all_reduces_forward_and_two_backward(ranks: Ranks, num_shards: int | None) -> None:
    size = inputs()[0].nbytes
    want = [("all_reduce", "forward", size)] * 2 + [("all_reduce", "backward", size)] * 2
    assert ranks(sent, num_shards=num_shards) == [want if ranks.world_size > 1 else []] * ranks.world_size
