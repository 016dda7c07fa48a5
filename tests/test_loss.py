"""Vocabulary-parallel cross-entropy against ``F.cross_entropy`` in float64, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src import Group, Ledger
from src.modeling import loss as loss_module
from src.modeling import loss_terms, vocab_parallel_cross_entropy
from src.testing import Ranks

COLUMNS = 104
TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-5, 1e-2)}
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignore": {"ignore_index": 7},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "all-mean": {"label_smoothing": 0.2, "z_loss": 1e-2, "vocab_size": 99},
    "all-sum": {"label_smoothing": 1.0, "z_loss": 1e-3, "vocab_size": 90, "ignore_index": 7, "reduction": "sum"},
    "all-none": {"label_smoothing": 0.1, "z_loss": 1e-3, "vocab_size": 77, "reduction": "none"},
}


def inputs(
    dtype: torch.dtype, options: dict[str, Any] | None = None, shape: tuple[int, ...] = (3, 7), scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of all ranks, targets of which some are ignored, and the gradient that ``reduction="none"`` receives."""
    options = options or {}
    vocab_size = options.get("vocab_size", COLUMNS)
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(*shape, COLUMNS, dtype=torch.float64, generator=generator)).to(dtype)
    targets = torch.randint(vocab_size, shape, generator=generator)
    targets.view(-1)[:4] = torch.tensor([options.get("ignore_index", -100), 7, 0, vocab_size - 1])
    return logits, targets, torch.randn(shape, dtype=torch.float64, generator=generator)


def reference(logits: Tensor, targets: Tensor, grad: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The loss in float64 and its gradient in all columns."""
    known = {"ignore_index": -100, "label_smoothing": 0.0} | options
    vocab_size, z_loss = known.pop("vocab_size", COLUMNS), known.pop("z_loss", 0.0)
    reduction = known.pop("reduction", "mean")
    leaf = logits.to(torch.float64, copy=True).requires_grad_()
    rows, kept = leaf[..., :vocab_size].flatten(0, -2), targets.flatten() != known["ignore_index"]
    per_token = F.cross_entropy(rows, targets.flatten(), reduction="none", **known)
    per_token = (per_token + z_loss * rows.logsumexp(-1).square()).masked_fill(~kept, 0)
    total = per_token.sum()
    loss = {"mean": total / kept.sum(), "sum": total, "none": per_token.view(targets.shape)}[reduction]
    loss.backward(grad if reduction == "none" else None)
    return loss.detach(), leaf.grad


def slice_of(group: Group, logits: Tensor) -> Tensor:
    return logits.chunk(group.world_size, -1)[group.rank].contiguous()


def program(group: Group, logits: Tensor, targets: Tensor, grad: Tensor, options: dict[str, Any]) -> Any:
    leaf = slice_of(group, logits).requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf, targets, group=group, **options)
    loss.backward(grad.to(loss.dtype) if loss.dim() else None)
    return loss.detach(), leaf.grad


def whole(results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The replicated loss, and the gradient in all columns."""
    for loss, _ in results:
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=0, equal_nan=True)
    return results[0][0], torch.cat([grad for _, grad in results], -1)


def check(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    value, slope = TOLERANCES[dtype]
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got[1].dtype == dtype
    torch.testing.assert_close(got[0].double(), want[0], rtol=value, atol=value)
    torch.testing.assert_close(got[1].double(), want[1], rtol=slope, atol=slope * 1e-2)


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(ranks: Ranks, dtype: torch.dtype) -> None:
    for options in VARIANTS.values():
        case = (*inputs(dtype, options), options)
        check(whole(ranks(program, *case)), reference(*case), dtype)


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("num_shards", [None, 8])
@pytest.mark.parametrize("world_size", [1, 4])
def test_padded_columns_are_never_read(ranks: Ranks, padding: float, num_shards: int | None, world_size: int) -> None:
    options = {"label_smoothing": 0.2, "z_loss": 1e-2, "vocab_size": 75}
    logits, targets, grad = inputs(torch.float32, options)
    want = reference(logits, targets, grad, options)
    logits[..., 75:] = padding
    place = ("simulated", world_size)
    got = whole(ranks.on(*place)(program, logits, targets, grad, options, num_shards=num_shards))
    check(got, want, torch.float32)
    assert torch.equal(got[1][..., 75:], torch.zeros(3, 7, COLUMNS - 75))


@pytest.mark.parametrize("elements", [1, 2 * COLUMNS, 5 * COLUMNS])
@pytest.mark.parametrize("num_shards", [None, 8])
def test_blocks_of_rows(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, elements: int, num_shards: int | None) -> None:
    monkeypatch.setattr(loss_terms, "BLOCK_ELEMENTS", elements)
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "reduction": "none"}
    case = (*inputs(torch.float32, options), options)
    check(whole(ranks.on("simulated", 2)(program, *case, num_shards=num_shards)), reference(*case), torch.float32)


def test_large_logits(ranks: Ranks) -> None:
    options = {"z_loss": 1e-4}
    case = (*inputs(torch.float32, options, scale=1e4), options)
    (loss, grad), (want, want_grad) = whole(ranks.on("simulated", 2)(program, *case)), reference(*case)
    assert want > 1e4
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), want_grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("num_shards", [None, 8])
def test_logits_that_a_mask_excludes(ranks: Ranks, num_shards: int | None) -> None:
    logits, targets, grad = inputs(torch.float32)
    targets = targets % 26 + 26
    logits[0, :, :26], logits[1, :, 60:], logits[2, :3, 52:] = (float("-inf"),) * 3
    case = (logits, targets, grad, {"z_loss": 1e-2})
    check(whole(ranks.on("simulated", 4)(program, *case, num_shards=num_shards)), reference(*case), torch.float32)


@pytest.mark.ranks(1, 2)
def test_an_ignored_token_without_any_logits(ranks: Ranks) -> None:
    logits, targets, grad = inputs(torch.float32)
    logits[0, 1], targets[0, 1] = float("-inf"), -100
    loss, got = whole(ranks(program, logits, targets, grad, {"reduction": "sum"}))
    assert loss.isfinite() and got.isfinite().all() and not got[0, 1].any()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "vocab_size": 90}], ids=["plain", "smoothing"])
@pytest.mark.parametrize("num_shards", [None, 8])
def test_a_constant_added_to_all_logits_changes_nothing(
    ranks: Ranks, options: dict[str, Any], num_shards: int | None
) -> None:
    logits, targets, grad = inputs(torch.float64, options)
    logits = (logits * 64).round() / 64
    shifted = (logits + 2**14).float()
    assert torch.equal(shifted.double(), logits + 2**14)
    got = whole(ranks.on("simulated", 2)(program, shifted, targets, grad, options, num_shards=num_shards))
    check(got, reference(logits, targets, grad, options), torch.float32)


@pytest.mark.parametrize("reduction, value", [("mean", float("nan")), ("sum", 0.0)])
def test_all_targets_ignored(ranks: Ranks, reduction: str, value: float) -> None:
    logits, targets, grad = inputs(torch.float32)
    options = {"reduction": reduction}
    loss, slopes = whole(ranks.on("simulated", 2)(program, logits, targets.fill_(-100), grad, options))
    torch.testing.assert_close(loss, torch.tensor(value), equal_nan=True)
    assert torch.equal(slopes, torch.zeros_like(logits))


def untouched(group: Group, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Strided logits and int32 targets give what contiguous ones give, and stay as they are."""
    plain = slice_of(group, logits)
    leaf = plain.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
    targets_before = targets.clone()
    assert not leaf.is_contiguous()
    loss = vocab_parallel_cross_entropy(leaf, targets.int(), group=group)
    loss.backward()
    assert torch.equal(leaf.detach(), plain) and torch.equal(targets, targets_before)
    return loss.detach(), leaf.grad


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("shape", [(9,), (3, 7), (2, 3, 4)])
def test_leading_shapes_strides_and_inputs_left_alone(ranks: Ranks, shape: tuple[int, ...]) -> None:
    logits, targets, grad = inputs(torch.float32, shape=shape)
    want = whole(ranks(program, logits, targets, grad, {}))
    got = whole(ranks(untouched, logits, targets))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    none = ranks(program, logits, targets, grad, {"reduction": "none"})[0][0]
    assert none.shape == shape


def sent(group: Group, logits: Tensor, targets: Tensor, smoothing: float) -> list[tuple[str, str, int]]:
    leaf = slice_of(group, logits).requires_grad_()
    with Ledger() as ledger:
        vocab_parallel_cross_entropy(leaf, targets, group=group, label_smoothing=smoothing).backward()
    return [(r.op, r.phase, r.payload_bytes) for r in ledger.records]


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 4])
def test_one_collective_forward_and_none_backward(ranks: Ranks, num_shards: int | None) -> None:
    logits, targets, _ = inputs(torch.bfloat16)
    shards = 1 if num_shards is None else num_shards // ranks.world_size
    for smoothing, token_bytes in ((0.0, 8), (0.1, 12)):
        want = [] if ranks.world_size == 1 else [("all_gather", "forward", targets.numel() * token_bytes * shards)]
        assert ranks(sent, logits, targets, smoothing, num_shards=num_shards) == [want] * ranks.world_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mean", "all-mean", "all-sum", "all-none"])
def test_same_bits_at_every_size(ranks: Ranks, dtype: torch.dtype, name: str) -> None:
    options = VARIANTS[name]
    case = (*inputs(dtype, options), options)
    want = whole(ranks.on("simulated", 1)(program, *case, num_shards=8))
    for place in [("simulated", 2), ("simulated", 4), ("simulated", 8), ("gloo", 2)]:
        got = whole(ranks.on(*place)(program, *case, num_shards=8))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), place


def over_its_logits(group: Group, logits: Tensor, targets: Tensor, grad: Tensor, options: dict[str, Any]) -> Any:
    """As ``program``, twice: the gradient in memory of its own, and where the logits were."""
    found = []
    for inplace in (False, True):
        leaf = slice_of(group, logits).requires_grad_()
        made, where = leaf.clone(), []
        made.register_hook(lambda grad, where=where: where.append(grad.data_ptr()))
        loss = vocab_parallel_cross_entropy(made, targets, group=group, inplace_backward=inplace, **options)
        loss.backward(grad.to(loss.dtype) if loss.dim() else None)
        assert (where == [made.data_ptr()]) == inplace
        assert torch.equal(made.detach(), leaf.grad if inplace else leaf.detach())
        found += [loss.detach(), leaf.grad]
    return found


@pytest.mark.ranks(1, 2, gloo=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_shards", [None, 8])
def test_inplace_backward_has_the_same_bits(ranks: Ranks, dtype: torch.dtype, num_shards: int | None) -> None:
    for options in VARIANTS.values():
        case = (*inputs(dtype, options), options)
        for loss, grad, loss_in_place, grad_in_place in ranks(over_its_logits, *case, num_shards=num_shards):
            assert torch.equal(loss, loss_in_place) and torch.equal(grad, grad_in_place)


def test_logits_that_others_need_are_not_destroyed_unseen() -> None:
    leaf, targets = inputs(torch.float32)[0].requires_grad_(), inputs(torch.float32)[1]

    def loss(logits: Tensor, inplace: bool = True) -> Tensor:
        return vocab_parallel_cross_entropy(logits, targets, group=None, inplace_backward=inplace)

    twice = loss(leaf * 1)
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"a second backward .* with inplace_backward=True"):
        twice.backward()
    logits = leaf.exp()  # its result is saved for its own backward, which comes later
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(logits).backward()
    logits = leaf * 1
    before = logits.square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (before + loss(logits)).backward()
    logits = leaf * 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss(logits) + loss(logits)).backward()
    grads = []
    for inplace in (False, True):
        logits = leaf * 1
        total = loss(logits, inplace) + logits.square().mean()  # whose backward comes first
        grads.append(torch.autograd.grad(total, leaf)[0])
    assert torch.equal(*grads)


def test_what_a_kernel_writes_over_logits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loss_module, "write_gradients", lambda *args: None
    )  # raises no version, as a kernel raises none
    logits, targets, _ = inputs(torch.float32)
    made = logits.requires_grad_().exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        vocab_parallel_cross_entropy(made, targets, group=None, inplace_backward=True).backward()


def test_inplace_backward_keeps_away_from_leaves_and_strided_logits() -> None:
    logits, targets, _ = inputs(torch.float32)
    for leaf in (logits.clone().requires_grad_(), logits.clone().requires_grad_().view(21, COLUMNS)):
        with pytest.raises(ValueError, match="would write the gradient over a leaf"):
            vocab_parallel_cross_entropy(leaf, targets.view(leaf.shape[:-1]), group=None, inplace_backward=True)
    plain = logits.clone()
    vocab_parallel_cross_entropy(plain, targets, group=None, inplace_backward=True)  # asks for no gradient
    assert torch.equal(plain, logits)
    strided = (logits.clone().requires_grad_() * 1)[:, :-1]
    vocab_parallel_cross_entropy(strided, targets[:, :-1], group=None, inplace_backward=True).backward()
    assert torch.equal(strided, logits[:, :-1])


def fails(logits: Tensor, targets: Tensor, **options: Any) -> None:
    vocab_parallel_cross_entropy(logits, targets, group=options.pop("group", Group.single()), **options)


def test_errors() -> None:
    logits, targets = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
    above, below = targets.clone(), targets.clone()
    above[1, 2], below[0, 1] = 8, -1
    with pytest.raises(ValueError, match=r"targets: value 8 at position \(1, 2\) on rank 0 is outside \[0, 8\)"):
        fails(logits, above)
    with pytest.raises(ValueError, match=r"targets: value -1 at position \(0, 1\) on rank 0"):
        fails(logits, below)
    with pytest.raises(ValueError, match=r"value 8 .* outside \[0, 6\)"):
        fails(logits, above, vocab_size=6)
    with pytest.raises(TypeError, match=r"targets must be int32 or int64, not torch.float32"):
        fails(logits, targets.float())
    with pytest.raises(TypeError, match=r"logits must be floating-point, not torch.int64"):
        fails(logits.long(), targets)
    with pytest.raises(ValueError, match=r"targets \[2\] must have the leading shape of logits \[2, 3, 8\]"):
        fails(logits, targets[:, 0])
    with pytest.raises(ValueError, match=r"vocab_size=9 does not fit the 8 columns"):
        fails(logits, targets, vocab_size=9)
    with pytest.raises(ValueError, match=r"8 local columns do not divide into 16 logical shards"):
        fails(logits, targets, group=Group.single(16))
    with pytest.raises(ValueError, match=r"label_smoothing=1.5 must lie in \[0, 1\]"):
        fails(logits, targets, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"reduction='avg' is not"):
        fails(logits, targets, reduction="avg")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed(use_reentrant: bool) -> None:
    logits, targets, grad = inputs(torch.float32)
    want = program(Group.single(), logits, targets, grad, {})
    leaf = logits.clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(x * 1, targets, group=None)

    got = checkpoint(loss, leaf, use_reentrant=use_reentrant)
    got.backward()
    assert torch.equal(got.detach(), want[0]) and torch.equal(leaf.grad, want[1])


def test_losses_may_be_modified_in_place() -> None:
    logits, targets, grad = inputs(torch.float32)
    grads = []
    for change in (lambda loss: loss.mul_(2).add_(1), lambda loss: loss * 2 + 1):
        leaf = logits.clone().requires_grad_()
        change(vocab_parallel_cross_entropy(leaf, targets, group=None, reduction="none")).backward(grad.float())
        grads.append(leaf.grad)
    assert torch.equal(*grads)
