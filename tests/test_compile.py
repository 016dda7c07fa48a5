"""torch.compile over tensor-parallel blocks: one graph, forward and backward, that is not compiled again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

from src import Group
from src.checkpoint import sharded_state_dict
from src.modeling import (
    LMHead,
    ModelArgs,
    Transformer,
    TransformerBlock,
    loss_terms,
    precompute_freqs_cis,
    vocab_parallel_cross_entropy,
)
from src.testing import Ranks
from src.training import train_step
from tests.test_linear_loss import LOGITS, NARROW, TOKENS, WIDTH, peak

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=8, vocab_size=51, multiple_of=32, max_seq_len=16, pad_vocab=True)
BATCH, LENGTH = 2, 8


class Stack(nn.Module):
    """Two blocks and what they need beside their input."""

    def __init__(self, args: ModelArgs, group: Group, sequence_parallel: bool, device: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"group": group, "sequence_parallel": sequence_parallel, "device": device}
        self.blocks = nn.ModuleList(TransformerBlock(i, args, **options) for i in range(2))
        self.register_buffer("freqs_cis", precompute_freqs_cis(args.head_dim, LENGTH).to(device))
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -torch.inf, device=device).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, 0, self.freqs_cis, self.mask)
        return x


def train(model: nn.Module, called: Any, shape: tuple[int, ...], device: str) -> list[Tensor]:
    """Outputs and gradients of three steps of SGD, each with another input."""
    found = []
    for step in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(device).requires_grad_()
        model.zero_grad()
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            y = called(x)
            y.square().mean().backward()
        found += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return found


def compiled_and_eager(
    group: Group, args: ModelArgs, sequence_parallel: bool, backend: str, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor], int]:
    torch.compiler.reset()
    shape = (BATCH, LENGTH // (group.world_size if sequence_parallel else 1), args.dim)
    counter = CompileCounterWithBackend(backend)
    models = [Stack(args, group, sequence_parallel, device) for _ in range(2)]
    compiled = torch.compile(models[0], fullgraph=True, backend=counter)
    got, want = train(models[0], compiled, shape, device), train(models[1], models[1], shape, device)
    return got, want, counter.frame_count


FORMS = {
    "plain": ({}, False, None),
    "one kv head": ({"n_kv_heads": 1}, False, None),
    "sequence parallel": ({}, True, None),
    "4 shards": ({}, False, 4),
    "sequence parallel, 2 kv heads of 8 shards": ({"n_kv_heads": 2}, True, 8),
}


QUICK = ("plain",)


@pytest.mark.parametrize("form", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FORMS])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_blocks_are_one_graph(ranks: Ranks, form: str, backend: str) -> None:
    settings, sequence_parallel, num_shards = FORMS[form]
    on_gloo = ranks.on("gloo", 2)
    results = on_gloo(compiled_and_eager, replace(ARGS, **settings), sequence_parallel, backend, num_shards=num_shards)
    for got, want, graphs in results:
        assert graphs == 1
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def train_model(group: Group, backend: str | None) -> tuple[Tensor, list[str]]:
    """Losses and norms of a whole model, and the names in its checkpoint."""
    torch.compiler.reset()
    model: Any = Transformer(replace(ARGS, tie_embeddings=True), group=group)
    if backend is not None:
        model = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    numbers = []
    for step in range(3):
        ids = torch.randint(0, 51, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            result = train_step(model, optimizer, [(ids[:, :-1], ids[:, 1:])], group=group)
        numbers += [result.loss, result.grad_norm]
    return torch.stack(numbers), list(sharded_state_dict(model, optimizer, group=group))


def test_a_compiled_model_trains(ranks: Ranks) -> None:
    on_gloo = ranks.on("gloo", 2)
    for got, want in zip(on_gloo(train_model, "aot_eager"), on_gloo(train_model, None), strict=True):
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
        assert got[1] == want[1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_graph_of_a_cross_entropy_does_not_grow_with_its_tokens(
    smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no graph is compiled, rows are taken in blocks."""
    monkeypatch.setattr(loss_terms, "BLOCK_ELEMENTS", 64)
    sizes = []
    for tokens in (4, 40):
        torch.compiler.reset()
        generator = torch.Generator().manual_seed(0)
        targets = torch.randint(50, (tokens,), generator=generator)
        leaf = torch.randn(tokens, 51, generator=generator).bfloat16().requires_grad_()
        graphs = EagerAndRecordGraphs()

        def loss(x: Tensor, targets: Tensor = targets) -> Tensor:
            options: dict[str, Any] = {"vocab_size": 50, "label_smoothing": smoothing, "z_loss": 0.1}
            return vocab_parallel_cross_entropy(x, targets, group=None, **options)

        got, want = (f(leaf) for f in (torch.compile(loss, fullgraph=True, dynamic=False, backend=graphs), loss))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        grads = [torch.autograd.grad(y, leaf)[0] for y in (got, want)]
        torch.testing.assert_close(*grads, rtol=2**-7, atol=1e-6)
        assert not grads[0][:, 50:].any()
        modules = [module for graph in graphs.graphs for module in graph.modules() if hasattr(module, "graph")]
        sizes.append(sum(len(module.graph.nodes) for module in modules))
    assert sizes[0] == sizes[1]


def losses(group: Group, options: dict[str, Any], dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    """Losses and gradients of a whole model on three batches."""
    torch.compiler.reset()
    model = Transformer(replace(ARGS, tie_embeddings=True), group=group)
    called: Any = model
    if backend is not None:
        blocks = options.get("block_tokens", BATCH * LENGTH) < BATCH * LENGTH
        called = torch.compile(model, fullgraph=not blocks, backend=backend)
    found = []
    for step in range(3):
        ids = torch.randint(0, 51, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            with autocast:
                loss = called(ids[:, :-1], targets=ids[:, 1:], **options)
            loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    return found


LOSSES: dict[str, dict[str, Any]] = {
    "at once": {},
    "blocks": {"block_tokens": 5},
    "blocks, all options": {"block_tokens": 5, "label_smoothing": 0.1, "z_loss": 1e-3, "ignore_index": 3},
    "one block": {"block_tokens": BATCH * LENGTH},
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "loss, num_shards", [("blocks", 4), *(pytest.param(loss, None, marks=pytest.mark.slow) for loss in LOSSES)]
)
def test_losses_inside_a_compiled_model(
    ranks: Ranks, loss: str, num_shards: int | None, backend: str, dtype: torch.dtype
) -> None:
    on_gloo, tolerance = ranks.on("gloo", 2), 1e-5 if dtype == torch.float32 else 2e-2
    run = (losses, LOSSES[loss], dtype)
    found = (on_gloo(*run, how, num_shards=num_shards) for how in (backend, None))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_blocks_of_a_compiled_loss_hold_the_logits_of_one(num_shards: int) -> None:
    torch.compiler.reset()
    head = LMHead(NARROW, WIDTH, group=Group.single(num_shards))
    hidden, targets = torch.randn(TOKENS, NARROW, requires_grad=True), torch.zeros(TOKENS, dtype=torch.int64)
    compiled = torch.compile(lambda: head(hidden, targets, block_tokens=16), backend="aot_eager")
    compiled().backward()
    assert peak(lambda: compiled().backward()) < LOGITS // 4


def test_blocks_are_no_part_of_a_full_graph() -> None:
    torch.compiler.reset()
    model = torch.compile(Transformer(ARGS), fullgraph=True, backend="aot_eager")
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="block_tokens cannot be part of a graph"):
        model(ids, targets=ids, block_tokens=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, found none")
@pytest.mark.parametrize("form", ["plain", "4 shards"])
def test_blocks_are_one_graph_on_a_gpu(ranks: Ranks, form: str) -> None:
    settings, sequence_parallel, num_shards = FORMS[form]
    place = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    on_gpus = ranks.on(place, 2)
    arguments = (replace(ARGS, **settings), sequence_parallel, "inductor", "cuda")
    for got, want, graphs in on_gpus(compiled_and_eager, *arguments, num_shards=num_shards):
        assert graphs == 1
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
