"""FeedForward: Llama's sizes, values and gradients against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from src import Group, Ledger
from src.modeling import FeedForward
from src.testing import Ranks

from .test_attention import Weights, check_against, inputs, traced


def reference_mlp(weights: Weights, x: Tensor, prefix: str = "") -> Tensor:
    gate, up = (F.linear(x, weights[f"{prefix}{name}.weight"]) for name in ("w1", "w3"))
    return F.linear(gate * torch.sigmoid(gate) * up, weights[f"{prefix}w2.weight"])


@pytest.mark.parametrize(
    "dim, multiple_of, multiplier, size",
    [
        pytest.param(4096, 256, None, 11008, id="Llama-2-7B"),
        pytest.param(5120, 256, None, 13824, id="Llama-2-13B"),
        pytest.param(4096, 1024, 1.3, 14336, id="Llama-3-8B"),
        pytest.param(8192, 4096, 1.3, 28672, id="Llama-3-70B"),
        pytest.param(16384, 4096, 1.2, 53248, id="Llama-3-405B"),
        pytest.param(12, 32, None, 32, id="already-a-multiple"),
        pytest.param(14, 1, 1.3, 48, id="rounded-down-twice"),
    ],
)
def test_sizes(dim: int, multiple_of: int, multiplier: float | None, size: int) -> None:
    layer = FeedForward(dim, 4 * dim, multiple_of, multiplier, device="meta")
    assert layer.w1.weight.shape == layer.w3.weight.shape == (size, dim)
    assert layer.w2.weight.shape == (dim, size)
    assert [name for name, _ in layer.named_parameters()] == ["w1.weight", "w2.weight", "w3.weight"]


def forward_backward(group: Group) -> Any:
    return traced(FeedForward(32, 128, 16, 1.1, group=group, dtype=torch.float64))


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 4])
def test_values_and_gradients(ranks: Ranks, num_shards: int | None) -> None:
    check_against(reference_mlp, ranks(forward_backward, num_shards=num_shards))


def sent(group: Group) -> list[tuple[str, str, int]]:
    with Ledger() as ledger:
        forward_backward(group)
    return [(record.op, record.phase, record.payload_bytes) for record in ledger.records]


@pytest.mark.parametrize("num_shards", [None, 8])
def test_one_all_reduce_each_way(ranks: Ranks, num_shards: int | None) -> None:
    size = inputs()[0].nbytes
    want = [("all_reduce", "forward", size), ("all_reduce", "backward", size)]
    assert ranks.on("simulated", 2)(sent, num_shards=num_shards) == [want, want]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"out_features=86 cannot be sharded over num_shards=4 logical shards"):
        FeedForward(32, 128, 2, group=Group.single(4))
    with pytest.raises(ValueError, match=r"FeedForward expects a last dim of 32, got a tensor of shape \[2, 31\]"):
        FeedForward(32, 128, 16)(torch.zeros(2, 31))
    with pytest.raises(TypeError, match=r"FeedForward expects floating-point activations, not torch.int64"):
        FeedForward(32, 128, 16)(torch.zeros(2, 32, dtype=torch.int64))
