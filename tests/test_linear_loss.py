"""Head and cross-entropy in one: against float64, against the two apart bit for bit, and by the memory it takes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from src import Group, Ledger, parallelize
from src.modeling import (
    LMHead,
    ModelArgs,
    Transformer,
    loss_terms,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from src.testing import Ranks
from src.training import batch_loss

ROWS, HIDDEN, SHAPE = 104, 16, (3, 7)
BLOCKS = [None, 1, 8, 21]
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none", "ignore_index": 7},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-2, "vocab_size": 75, "reduction": "sum"},
}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the whole weight and bias, targets, and the gradient that ``reduction="none"`` receives."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, grad = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((*SHAPE, HIDDEN), (ROWS, HIDDEN), (ROWS,), SHAPE)
    )
    targets = torch.randint(75, SHAPE, generator=generator)
    targets.view(-1)[:4] = torch.tensor([-100, 7, 0, 74])
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets, grad


def own(group: Group, whole: Tensor) -> Tensor:
    return whole.chunk(group.world_size)[group.rank].clone().requires_grad_()


def program(group: Group, dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    """Loss, and gradients of hidden, weight and bias."""
    hidden, weight, bias, targets, grad = inputs(dtype)
    x, w, b = hidden.requires_grad_(), own(group, weight), own(group, bias)
    targets = targets.masked_fill(targets == -100, options.get("ignore_index", -100))
    loss = vocab_parallel_linear_cross_entropy(x, w, targets, group=group, bias=b, **options)
    loss.backward(grad.to(loss.dtype) if loss.dim() else None)
    return [loss.detach(), x.grad, w.grad, b.grad]


def whole(results: list[list[Tensor]]) -> list[Tensor]:
    """Replicated loss and gradient of hidden, and the gradients of all of weight and bias."""
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result[:2], results[0][:2], strict=True))
    return [*results[0][:2], torch.cat([r[2] for r in results]), torch.cat([r[3] for r in results])]


def reference(options: dict[str, Any]) -> list[Tensor]:
    hidden, weight, bias, targets, grad = inputs(torch.float64)
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
    known = {"ignore_index": -100, "label_smoothing": 0.0} | options
    vocab_size, z_loss, reduction = (
        known.pop(k, d) for k, d in (("vocab_size", ROWS), ("z_loss", 0), ("reduction", "mean"))
    )
    known.pop("block_tokens", None)
    flat = targets.masked_fill(targets == -100, known["ignore_index"]).flatten()
    logits = F.linear(hidden, weight, bias)[..., :vocab_size].flatten(0, 1)
    per_token = F.cross_entropy(logits, flat, reduction="none", **known) + z_loss * logits.logsumexp(-1).square()
    per_token = per_token.masked_fill(flat == known["ignore_index"], 0)
    kept = (flat != known["ignore_index"]).sum()
    loss = {"mean": per_token.sum() / kept, "sum": per_token.sum(), "none": per_token.view(SHAPE)}[reduction]
    loss.backward(grad if loss.dim() else None)
    return [loss.detach(), hidden.grad, weight.grad, bias.grad]


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 8])
@pytest.mark.parametrize("block_tokens", BLOCKS)
def test_values_and_gradients(ranks: Ranks, block_tokens: int | None, num_shards: int | None) -> None:
    for options in VARIANTS.values():
        options = options | {"block_tokens": block_tokens}
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            got = whole(ranks(program, dtype, options, num_shards=num_shards))
            assert [x.dtype for x in got] == [dtype] * 4
            got = [x.double() for x in got]
            torch.testing.assert_close(got, reference(options), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_tokens", [None, 5])
def test_same_bits_at_every_size(ranks: Ranks, dtype: torch.dtype, block_tokens: int | None) -> None:
    run = (dtype, VARIANTS["all"] | {"block_tokens": block_tokens})
    want = whole(ranks.on("simulated", 1)(program, *run, num_shards=8))
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]:
        got = whole(ranks.on(*place)(program, *run, num_shards=8))
        assert [torch.equal(a, b) for a, b in zip(got, want, strict=True)] == [True] * 4, place


FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "autocast": {"dtype": torch.float32, "autocast": True},
    "sequence": {"dtype": torch.float32, "sequence_parallel": True},
    "bias": {"dtype": torch.float32, "bias": True},
}


def head_and_loss(
    group: Group, block_tokens: int | None, autocast: bool = False, **form: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients of a padded head, with its loss inside and apart."""
    generator, length = torch.Generator().manual_seed(0), 8
    sequences = torch.randn(2, length, HIDDEN, generator=generator).to(form["dtype"])
    targets = torch.randint(99, (2, length), generator=generator)
    if form.get("sequence_parallel"):
        sequences = sequences.chunk(group.world_size, 1)[group.rank]
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3, "ignore_index": 3}

    def run(inside: bool) -> list[Tensor]:
        head, x = LMHead(HIDDEN, 99, group=group, pad_vocab=True, **form), sequences.clone().requires_grad_()
        mode: AbstractContextManager[object] = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
        with mode:
            y = head(x, targets, block_tokens=block_tokens, **options) if inside else head(x)
        if not inside:
            assert not autocast or y.dtype == torch.bfloat16
            y = vocab_parallel_cross_entropy(y, targets, group=group, vocab_size=99, **options)
        y.backward()
        return [y.detach(), x.grad, *(p.grad for p in head.parameters())]

    return run(True), run(False)


def of_form(group: Group, form: str, block_tokens: int | None) -> tuple[list[Tensor], list[Tensor]]:
    return head_and_loss(group, block_tokens, **FORMS[form])


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("num_shards", [None, 8])
def test_bits_of_head_and_loss_apart(ranks: Ranks, form: str, num_shards: int | None) -> None:
    for inside, apart in ranks(of_form, form, None, num_shards=num_shards):
        assert [torch.equal(a, b) for a, b in zip(inside, apart, strict=True)] == [True] * len(apart)
    for inside, apart in ranks(of_form, form, 3, num_shards=num_shards):
        wide = form not in ("bfloat16", "autocast")
        torch.testing.assert_close(inside, apart, rtol=1e-5 if wide else 2e-2, atol=1e-6 if wide else 2e-3)


def padded_logits(group: Group, converted: bool) -> list[Tensor]:
    """Logits of a padded head, its weight, and gradients by the real ones."""
    torch.manual_seed(0)
    x, plain = torch.randn(*SHAPE, HIDDEN, requires_grad=True), nn.Linear(HIDDEN, 99, bias=False)
    if converted:
        head: Any = parallelize(nn.Sequential(plain), group, {"0": "lm_head"})
    else:
        head = LMHead.from_linear(plain, group=group, pad_vocab=True)
    y, (weight,) = head(x), head.parameters()
    y.masked_fill(y == -torch.inf, 0).square().sum().backward()
    return [y.detach(), weight.detach(), x.grad, weight.grad]


@pytest.mark.ranks(2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 8])
@pytest.mark.parametrize("converted", [False, True])
def test_logits_of_padding(ranks: Ranks, num_shards: int | None, converted: bool) -> None:
    results = ranks(padded_logits, converted, num_shards=num_shards)
    logits, weight, weight_grad = (torch.cat([r[i] for r in results], dim) for i, dim in ((0, -1), (1, 0), (3, 0)))
    torch.manual_seed(0)
    x, plain = torch.randn(*SHAPE, HIDDEN, requires_grad=True), nn.Linear(HIDDEN, 99, bias=False)
    want = plain(x)
    want.square().sum().backward()
    assert (logits[..., 99:] == -torch.inf).all() and logits.shape[-1] > 99
    assert torch.equal(weight[:99], plain.weight) and not weight[99:].any() and not weight_grad[99:].any()
    torch.testing.assert_close(logits[..., :99], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight_grad[:99], plain.weight.grad, rtol=1e-5, atol=1e-4)
    for result in results:
        torch.testing.assert_close(result[2], x.grad, rtol=1e-5, atol=1e-4)


def sent(group: Group, block_tokens: int | None) -> list[tuple[str, str, int]]:
    hidden, weight, _, targets, _ = inputs()
    x, w = hidden.requires_grad_(), own(group, weight)
    with Ledger() as ledger:
        vocab_parallel_linear_cross_entropy(x, w, targets, group=group, block_tokens=block_tokens).backward()
    return [(record.op, record.phase, record.payload_bytes) for record in ledger.records]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("block_tokens", [None, 4])
def test_one_collective_each_way(ranks: Ranks, block_tokens: int | None) -> None:
    want = [("all_gather", "forward", 21 * 8), ("all_reduce", "backward", 21 * HIDDEN * 4)]
    assert ranks(sent, block_tokens) == [want] * 2


TOKENS, WIDTH, NARROW = 256, 1024, 8
LOGITS = TOKENS * WIDTH * 4


def peak(call: Any) -> int:
    """Bytes of CPU tensors alive at most during ``call``, beyond those alive before."""
    with profile(profile_memory=True) as found:
        call()
    events: list[Any] = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("num_shards", [1, 4])
def test_memory(monkeypatch: pytest.MonkeyPatch, num_shards: int) -> None:
    monkeypatch.setattr(loss_terms, "BLOCK_ELEMENTS", 2**10)
    group, generator = Group.single(num_shards), torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, NARROW, generator=generator, requires_grad=True)
    head = LMHead(NARROW, WIDTH - 5, group=group, pad_vocab=True)
    targets = torch.randint(WIDTH - 5, (TOKENS,), generator=generator)

    def apart() -> None:
        vocab_parallel_cross_entropy(head(x), targets, group=group, vocab_size=WIDTH - 5).backward()

    for call in (apart, lambda: head(x, targets).backward(), lambda: head(x, targets, block_tokens=16).backward()):
        call()  # gradients are there already: no other step is like the first one
    small = LOGITS // 4  # the gradients of weight and input, statistics, blocks
    assert peak(apart) > 2 * LOGITS - small
    assert LOGITS <= peak(lambda: head(x, targets).backward()) < LOGITS + small
    assert peak(lambda: head(x, targets, block_tokens=16).backward()) < LOGITS // 7
    with torch.no_grad():
        assert peak(lambda: head(x, targets, block_tokens=16)) < LOGITS // 16 + LOGITS // 8


@pytest.mark.parametrize("block_tokens", [None, 4])
def test_what_is_frozen_gets_no_gradient(block_tokens: int | None) -> None:
    want = program(Group.single(2), torch.float64, {"block_tokens": block_tokens})
    hidden, weight, bias, targets, _ = inputs(torch.float64)
    for trained in (0, 1, 2):
        leaves = [leaf.detach().clone().requires_grad_(i == trained) for i, leaf in enumerate((hidden, weight, bias))]
        x, w, b = leaves
        options: dict[str, Any] = {"group": Group.single(2), "bias": b, "block_tokens": block_tokens}
        vocab_parallel_linear_cross_entropy(x, w, targets, **options).backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == trained for i in range(3)]
        assert torch.equal(leaves[trained].grad, want[1 + trained])


def test_blocks_are_summed_in_float32() -> None:
    hidden, weight, *_ = inputs(torch.bfloat16)
    x, targets, grads = hidden[:1, :1].expand(1, 600, -1), torch.zeros(1, 600, dtype=torch.int64), []
    for block_tokens in (None, 1):
        w, b = weight.clone().requires_grad_(), torch.zeros_like(weight[:, 0], requires_grad=True)
        options: dict[str, Any] = {"group": None, "bias": b, "reduction": "sum", "block_tokens": block_tokens}
        vocab_parallel_linear_cross_entropy(x, w, targets, **options).backward()
        grads.append((w.grad, b.grad))
    torch.testing.assert_close(*grads, rtol=2e-2, atol=0)  # in bfloat16 a sum of equal terms ends at the 256th


def test_gradients_of_weights_are_added_where_they_are() -> None:
    hidden, targets = torch.ones(16, 256), torch.zeros(16, dtype=torch.int64)
    weight = torch.ones(128, 256, requires_grad=True)

    def call() -> None:
        vocab_parallel_linear_cross_entropy(hidden, weight, targets, group=None, block_tokens=4).backward()

    call()
    assert weight.nbytes <= peak(call) < 1.5 * weight.nbytes


def test_int32_targets() -> None:
    hidden, weight, _, targets, _ = inputs()
    for block_tokens in (None, 4):
        grads = []
        for ids in (targets, targets.int()):
            x = hidden.clone().requires_grad_()
            vocab_parallel_linear_cross_entropy(x, weight, ids, group=None, block_tokens=block_tokens).backward()
            grads.append(x.grad)
        assert torch.equal(*grads)


def test_a_second_backward() -> None:
    hidden, weight, _, targets, _ = inputs()
    x = hidden.requires_grad_()
    blocked = vocab_parallel_linear_cross_entropy(x, weight, targets, group=None, block_tokens=4)
    first, second = (torch.autograd.grad(blocked, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    for block_tokens in (None, targets.numel()):  # a single block is no other way
        loss = vocab_parallel_linear_cross_entropy(x, weight, targets, group=None, block_tokens=block_tokens)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"a second backward .* with head and loss in one"):
            loss.backward()


def test_backward_inside_autocast() -> None:
    hidden, weight, _, targets, _ = inputs()
    grads = []
    for inside in (False, True):
        x = hidden.clone().requires_grad_()
        loss = vocab_parallel_linear_cross_entropy(x, weight, targets, group=None, block_tokens=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


ARGS = ModelArgs(dim=32, n_layers=1, n_heads=8, vocab_size=51, multiple_of=32, max_seq_len=16, pad_vocab=True)
TIED = ModelArgs(**{**vars(ARGS), "tie_embeddings": True})


def model_and_loss(group: Group, args: ModelArgs, sequence_parallel: bool) -> list[list[Tensor]]:
    """Loss and gradients of a model: its loss apart, inside, inside by blocks."""
    ids = torch.randint(0, 51, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for way in ("apart", "inside", "blocks"):
        model = Transformer(args, group=group, sequence_parallel=sequence_parallel)
        if way == "apart":
            loss = vocab_parallel_cross_entropy(model(ids[:, :-1]), ids[:, 1:], group=group, vocab_size=51)
        else:
            blocks = 5 if way == "blocks" else None
            loss = batch_loss(model, ids[:, :-1], ids[:, 1:], group=group, block_tokens=blocks)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    return found


@pytest.mark.ranks(2, gloo=())
@pytest.mark.parametrize("args", [ARGS, TIED], ids=["plain", "tied"])
@pytest.mark.parametrize("num_shards", [None, 4])
def test_models(ranks: Ranks, args: ModelArgs, num_shards: int | None) -> None:
    for sequence_parallel in (False, True):
        for apart, inside, blocks in ranks(model_and_loss, args, sequence_parallel, num_shards=num_shards):
            assert [torch.equal(a, b) for a, b in zip(inside, apart, strict=True)] == [True] * len(apart)
            torch.testing.assert_close(blocks, apart, rtol=1e-4, atol=1e-6)


def test_errors() -> None:
    hidden, weight, _, targets, _ = inputs()
    group = Group.single()
    with pytest.raises(ValueError, match=r"targets \[3\] must have the leading shape \[3, 7\] of hidden"):
        vocab_parallel_linear_cross_entropy(hidden, weight, targets[:, 0], group=group)
    with pytest.raises(ValueError, match=r"block_tokens=0 must be at least 1"):
        vocab_parallel_linear_cross_entropy(hidden, weight, targets, group=group, block_tokens=0)
    with pytest.raises(ValueError, match=r"expects a last dim of 16"):
        vocab_parallel_linear_cross_entropy(hidden[..., :8], weight, targets, group=group)
    with pytest.raises(ValueError, match=r"targets: value 104 at position \(0, 0\) on rank 0 is outside \[0, 104\)"):
        vocab_parallel_linear_cross_entropy(hidden, weight, targets.clone().fill_(104), group=group)
    with pytest.raises(ValueError, match=r"vocab_size=105 does not fit the 104 columns"):
        vocab_parallel_linear_cross_entropy(hidden, weight, targets, group=group, vocab_size=105)
    with pytest.raises(ValueError, match=r"z_loss=-1 must not be negative"):
        LMHead(HIDDEN, ROWS, group=group)(hidden, targets, z_loss=-1)
    with pytest.raises(TypeError, match=r"z_loss: options of a loss, which needs targets"):
        LMHead(HIDDEN, ROWS, group=group)(hidden, z_loss=1e-3)
    with pytest.raises(ValueError, match=r"the model was built for .*num_shards=1.*not for .*num_shards=2"):
        batch_loss(Transformer(ARGS), targets, targets, group=Group.single(2))


@pytest.mark.parametrize("block_tokens", [None, 4])
def test_recomputed(block_tokens: int | None) -> None:
    hidden, weight, _, targets, _ = inputs()
    grads = []
    for recomputed in (False, True):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]

        def loss(x: Tensor, w: Tensor) -> Tensor:
            return vocab_parallel_linear_cross_entropy(x, w, targets, group=None, block_tokens=block_tokens)

        (checkpoint(loss, *leaves, use_reentrant=False) if recomputed else loss(*leaves)).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
