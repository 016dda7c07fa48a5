"""A table's gradient from the second micro-batch on: rows are added to ``.grad`` in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from src import Group
from src.functional import shard_embedding
from src.kernels import cpu_embedding
from src.modeling import ParallelVocabEmbedding, vocab_parallel_linear_cross_entropy
from src.testing import Ranks
from tests.test_linear_loss import peak

VOCAB, WIDTH, TOKENS = 4096, 16, 2048
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Ids, many of them often, and a gradient for their rows."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(VOCAB, (2, TOKENS // 2), generator=generator)  # noqa: E731
    return [(draw() % 600 * 5, torch.randn(2, TOKENS // 2, WIDTH, generator=generator)) for _ in range(count)]


def accumulated(group: Group | None, dtype: torch.dtype = torch.float32, way: str = "backward") -> Tensor:
    layer = ParallelVocabEmbedding(VOCAB, WIDTH, process_group=group, dtype=dtype)
    module = DistributedDataParallel(layer) if way == "ddp" else layer
    if way == "hook":
        layer.weight.register_hook(lambda grad: grad * 1)
    layer.weight.grad = torch.ones_like(layer.weight)
    for ids, grad in batches():
        out = module(ids)
        if way == "grad":
            layer.weight.grad += torch.autograd.grad(out, layer.weight, grad.to(dtype))[0]
        else:
            out.backward(grad.to(dtype))
    assert isinstance(layer.weight.grad, Tensor)
    return layer.weight.grad


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each backward, whether it added rows."""
    found: list[bool] = []
    decide = cpu_embedding.is_added_to_grad

    def noted(node: Any) -> bool:
        found.append(decide(node))
        return found[-1]

    monkeypatch.setattr(cpu_embedding, "is_added_to_grad", noted)
    yield found


@pytest.fixture
def whole_tables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls something with gradients that are whole tables."""

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(cpu_embedding, "is_added_to_grad", lambda node: False)
            return function(*arguments)

    return call


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("way, in_place", [("backward", True), ("hook", False), ("grad", False)])
def test_bits(
    decisions: list[bool], whole_tables: Callable[..., Any], dtype: torch.dtype, way: str, in_place: bool
) -> None:
    got = accumulated(None, dtype, way)
    assert decisions == [in_place] * 3 and got.layout == torch.strided
    assert torch.equal(got, whole_tables(accumulated, None, dtype))


@pytest.mark.parametrize("num_shards", [None, 8])
def test_every_size(ranks: Ranks, num_shards: int | None) -> None:
    want = accumulated(None)
    for place in [("simulated", 2), ("simulated", 8), ("gloo", 2)]:
        assert torch.equal(torch.cat(ranks.on(*place)(accumulated, num_shards=num_shards)), want)


@pytest.mark.ranks(gloo=2)
def test_under_data_parallel(ranks: Ranks) -> None:
    """All ranks have the same batches: their mean is that of one."""
    for got in ranks(of_replicas):
        torch.testing.assert_close(got, accumulated(None))


def of_replicas(group: Group) -> Tensor:
    return accumulated(Group.single(), way="ddp")


def test_memory(whole_tables: Callable[..., Any]) -> None:
    layer, (ids, grad) = ParallelVocabEmbedding(15 * VOCAB, WIDTH), batches()[0]
    table_bytes = layer.weight.nbytes

    def step() -> None:
        layer(ids).backward(grad)

    assert peak(step) > table_bytes  # the first gradient becomes .grad
    assert peak(step) < table_bytes // 4
    assert whole_tables(peak, step) > table_bytes


def test_a_table_that_is_the_head_too(decisions: list[bool], whole_tables: Callable[..., Any]) -> None:
    ids, _ = batches()[0]

    def step(table: nn.Parameter) -> Tensor:
        for _ in range(2):
            hidden = ParallelVocabEmbedding.forward(layer, ids)
            vocab_parallel_linear_cross_entropy(hidden, table, ids, group=None).backward()
        assert table.grad is not None
        return table.grad

    grads = []
    for call in (step, lambda table: whole_tables(step, table)):
        layer = ParallelVocabEmbedding(VOCAB, WIDTH)
        grads.append(call(layer.weight))
    assert decisions == [False, True] and grads[0].layout == torch.strided
    assert torch.equal(*grads)


def test_two_lookups_in_one_backward(decisions: list[bool], whole_tables: Callable[..., Any]) -> None:
    def step() -> Tensor:
        layer = ParallelVocabEmbedding(VOCAB, WIDTH)
        layer.weight.grad = torch.ones_like(layer.weight)
        (first, one), (second, two), _ = batches()
        (layer(first) * one + layer(second) * two).sum().backward()
        return layer.weight.grad

    got = step()
    assert decisions == [True, True] and torch.equal(got, whole_tables(step))


@pytest.mark.parametrize("layout", ["transposed", "sparse"])
def test_a_gradient_that_takes_no_rows(decisions: list[bool], layout: str) -> None:
    table = torch.ones(VOCAB, WIDTH, requires_grad=True)
    before, (ids, grad) = torch.ones(WIDTH, VOCAB).t(), batches()[0]
    table.grad = before.to_sparse(1) if layout == "sparse" else before.clone()
    shard_embedding(ids, table, 0).backward(grad)
    want = torch.zeros(VOCAB, WIDTH).index_add_(0, ids.flatten(), grad.flatten(0, 1)) + 1
    assert decisions == [False] and torch.equal(table.grad, want)


class Named(torch.autograd.Function):
    """Keeps its input under the name that the node of a leaf has for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = x
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        assert grad.layout == torch.strided
        return grad


def test_a_table_that_is_no_leaf() -> None:
    table = torch.ones(VOCAB, WIDTH, requires_grad=True)
    for ids, grad in batches():
        shard_embedding(ids, Named.apply(table), 0).backward(grad)
