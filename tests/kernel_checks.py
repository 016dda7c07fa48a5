"""Each kernel against the body in float64, values and gradients. ``test_kernels.py`` runs this file: on the CPU in
Triton's interpreter, which has to be chosen before Triton is imported, and on a GPU where there is one.

The interpreter truncates where a GPU rounds to bfloat16, so that is compared to one unit in the last place. It needs
milliseconds a program: small grids.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from src import Group
from src import functional as fn
from src.kernels import cross_entropy, norm, registry
from src.modeling import loss_terms, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EPSILON = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}
dtypes = pytest.mark.parametrize("dtype", EPSILON, ids=str)
NORM_SHAPES = [((3, 48), 48), ((2, 3, 48), 16), ((5, 36), 12), ((3, 4100), 4100), ((7,), 1)]


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that a kernel served."""
    ops: list[str] = []

    def lookup(op: str, *arguments: Any) -> Any:
        kernel = registry.lookup(op, *arguments)
        ops.extend([op] * (kernel is not None))
        return kernel

    monkeypatch.setattr(registry, "DEVICES", (DEVICE,))
    monkeypatch.setattr(fn, "lookup", lookup)
    monkeypatch.setattr(loss_terms, "lookup", lookup)
    return ops


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def results(function: Callable[..., Any], tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """What ``function`` gives for the tensors, and its gradients in them."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, grads)
    return [*(y.detach() for y in outs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(function: Callable[..., Any], *tensors: Tensor, factor: float = 1, scale: float = 1) -> list[Tensor]:
    """Hold the kernel against the body on float64; two runs have the same bits."""
    dtype = tensors[0].dtype
    with torch.no_grad():
        outs = function(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [numbers(100 + i, *y.shape, dtype=y.dtype, scale=scale) for i, y in enumerate(outs)]
    got, again = (results(function, list(tensors), grads) for _ in range(2))
    want = results(function, [t.double() for t in tensors], [g.double() for g in grads])
    for one, two, body in zip(got, again, want, strict=True):
        assert torch.equal(one, two)
        tolerance = factor * EPSILON[dtype]
        size = body[body.isfinite()].abs().max().item() if body.isfinite().any() else 0
        torch.testing.assert_close(one.double(), body, rtol=tolerance, atol=tolerance * size)
    assert all(y.dtype == x.dtype for y, x in zip(got[len(outs) :], tensors, strict=True))
    return got


@dtypes
@pytest.mark.parametrize("shape, size", NORM_SHAPES)
def test_norm(dtype: torch.dtype, shape: tuple[int, ...], size: int, served: list[str]) -> None:
    got = compare(
        lambda x, w: fn.group_rms_norm(x, w, size, 1e-2), numbers(0, *shape, dtype=dtype), numbers(1, shape[-1])
    )
    assert got[0].dtype == dtype and served == 3 * ["group_rms_norm"]


@dtypes
def test_norm_with_several_rows_a_program(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "PARTS", 2)
    compare(lambda x, w: fn.group_rms_norm(x, w, 12, 1e-5), numbers(0, 11, 36, dtype=dtype), numbers(1, 36))


@pytest.mark.parametrize("dtype, weight_dtype", [(torch.float32, torch.float16), (torch.float16, torch.bfloat16)])
def test_norm_with_a_weight_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    factor = EPSILON[weight_dtype] / EPSILON[dtype]
    got = compare(
        lambda x, w: fn.rms_norm(x, w, 1e-5),
        numbers(0, 4, 8, dtype=dtype),
        numbers(1, 8, dtype=weight_dtype),
        factor=factor,
    )
    assert got[0].dtype == dtype


@dtypes
@pytest.mark.parametrize("shape, size", NORM_SHAPES)
def test_add_and_norm(dtype: torch.dtype, shape: tuple[int, ...], size: int, served: list[str]) -> None:
    x, residual, weight = numbers(0, *shape, dtype=dtype), numbers(2, *shape, dtype=dtype), numbers(1, shape[-1])
    # In float64 the sum is not rounded: what that adds to the norm is as much again.
    got = compare(lambda x, r, w: fn.add_group_rms_norm(x, r, w, size, 1e-2), x, residual, weight, factor=2)
    assert [y.dtype for y in got[:2]] == [dtype] * 2 and torch.equal(got[2], got[3])
    assert served == 3 * ["add_group_rms_norm"]


@dtypes
@pytest.mark.parametrize("shape, size", NORM_SHAPES)
def test_add_and_norm_has_the_bits_of_both_apart(dtype: torch.dtype, shape: tuple[int, ...], size: int) -> None:
    x, residual, weight = numbers(0, *shape, dtype=dtype), numbers(2, *shape, dtype=dtype), numbers(1, shape[-1])
    normed, total = fn.add_group_rms_norm(x, residual, weight, size, 1e-5)
    if dtype is not torch.bfloat16 or DEVICE == "cuda":  # the interpreter's sum is truncated
        assert torch.equal(total, x + residual)
    assert torch.equal(normed, fn.group_rms_norm(total, weight, size, 1e-5))


@dtypes
def test_add_and_norm_with_several_rows_a_program(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "PARTS", 2)
    x, residual, weight = numbers(0, 11, 36, dtype=dtype), numbers(2, 11, 36, dtype=dtype), numbers(1, 36)
    compare(lambda x, r, w: fn.add_group_rms_norm(x, r, w, 12, 1e-5), x, residual, weight)


@pytest.mark.parametrize("which", [0, 1])
def test_add_and_norm_of_which_one_output_is_used(which: int) -> None:
    weight = numbers(1, 12)
    compare(lambda x, r: fn.add_rms_norm(x, r, weight, 1e-5)[which], numbers(0, 5, 12), numbers(2, 5, 12))


@dtypes
@pytest.mark.parametrize("function, inputs", [(fn.rms_norm, 2), (fn.add_rms_norm, 3)])
def test_norms_compute_no_gradient_that_nobody_wants(
    dtype: torch.dtype, function: Callable[..., Any], inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is left has the bits that it has beside the others."""
    tensors = [*(numbers(i, 5, 12, dtype=dtype) for i in range(inputs - 1)), numbers(2, 12)]
    grads = [numbers(2 + i, 5, 12, dtype=dtype) for i in range(1, inputs)]
    together = results(lambda *leaves: function(*leaves, 1e-5), tensors, grads)[-inputs:]
    written: list[tuple[bool, bool]] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        if kernel is norm._backward:
            dx, partial = arguments[4:6]
            written.append((dx is not None, partial is not None))
        start(kernel, grid, *arguments, **settings)

    start = norm.launch
    monkeypatch.setattr(norm, "launch", launch)
    for i, want in enumerate(together):
        alone = lambda leaf: function(*tensors[:i], leaf, *tensors[i + 1 :], 1e-5)  # noqa: B023, E731
        assert torch.equal(results(alone, [tensors[i]], grads)[-1], want)
    assert written == [(True, False)] * (inputs - 1) + [(False, True)]


def test_add_and_norm_of_strided_and_shared_input() -> None:
    x, weight = numbers(0, 12, 5), numbers(1, 12)
    compare(lambda x, r, w: fn.add_rms_norm(x.t(), r.t(), w, 1e-5), x, numbers(2, 12, 5), weight)
    compare(lambda x, w: fn.add_rms_norm(x, x, w, 1e-5), x.t(), weight)


@pytest.mark.parametrize("value", [300.0, 60000.0])
def test_norm_of_large_half_activations(value: float) -> None:
    x = torch.linspace(-value, value, 40, device=DEVICE).half()
    got = compare(lambda x, w: fn.group_rms_norm(x, w, 20, 1e-5), x, numbers(1, 40))
    assert all(t.isfinite().all() for t in got)


def test_norm_of_zeros_without_eps_spoils_no_other_row() -> None:
    x = numbers(0, 3, 12)
    x[1] = 0
    y, dx, dw = results(lambda x, w: fn.rms_norm(x, w, 0.0), [x, numbers(1, 12)], [numbers(2, 3, 12)])
    assert y[1].isnan().all() and dw.isnan().all()
    assert y[[0, 2]].isfinite().all() and dx[[0, 2]].isfinite().all()


def test_norm_without_eps_keeps_absent_rows_out_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "PARTS", 1)
    compare(lambda x, w: fn.rms_norm(x, w, 0.0), numbers(0, 3, 12), numbers(1, 12))


@dtypes
def test_norm_of_strided_input(dtype: torch.dtype) -> None:
    x, weight = numbers(0, 12, 5, dtype=dtype).t(), numbers(1, 12)
    got = compare(lambda x, w: fn.group_rms_norm(x, w, 6, 1e-5), x, weight)
    assert got[0].is_contiguous()


@dtypes
@pytest.mark.parametrize("shape", [(3, 5), (2, 1111), (0, 4)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...], served: list[str]) -> None:
    if 0 in shape:
        empty = numbers(0, *shape, dtype=dtype)
        assert all(t.shape == shape for t in results(fn.swiglu, [empty, empty], [empty]))
        return
    compare(fn.swiglu, numbers(0, *shape, dtype=dtype, scale=3), numbers(1, *shape, dtype=dtype), factor=2)
    assert served == 3 * ["swiglu"]


@dtypes
@pytest.mark.parametrize("shape", [(3, 10), (2, 2, 4200), (1, 3, 2)])
def test_swiglu_of_halves_of_one_tensor_copies_nothing(
    dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the gradient of the result, or one half alone, lies apart."""
    monkeypatch.setattr(Tensor, "contiguous", lambda x: pytest.fail("a copy"))
    packed = numbers(0, *shape, dtype=dtype, scale=3)
    gate, up = packed.chunk(2, -1)
    compare(lambda x: fn.swiglu(*x.chunk(2, -1)), packed, factor=2)
    compare(lambda gate: fn.swiglu(gate, up.to(gate.dtype)), gate.clone(), factor=2)
    compare(lambda x: torch.cat([fn.swiglu(*x.chunk(2, -1)), x], -1), packed, factor=2)


@dtypes
def test_swiglu_of_strided_columns(dtype: torch.dtype) -> None:
    """Gaps between channels, rows without a common distance, one row for all."""
    rows = numbers(0, 6, 5, dtype=dtype)
    compare(lambda x: fn.swiglu(x.t(), x.t().flip(0)), rows, factor=2)
    heads = numbers(1, 2, 3, 5, dtype=dtype)
    compare(lambda x: fn.swiglu(x[:, :, :2].transpose(0, 1), x[:, :, 3:].transpose(0, 1)), heads, factor=2)
    compare(lambda x: fn.swiglu(x[:1].expand(6, 5), x), rows, factor=2)
    compare(lambda x: fn.swiglu(x[::2], x[1::2]), numbers(2, 8, dtype=dtype), factor=2)


def test_swiglu_of_extreme_gates() -> None:
    gate = torch.tensor([-60000.0, -100.0, 0.0, 100.0, 60000.0], device=DEVICE).half()
    assert all(t.isfinite().all() for t in compare(fn.swiglu, gate, torch.full_like(gate, 0.5), scale=0.1))


def tables(kind: str, length: int, dim: int, batch: int | None, dtype: torch.dtype) -> fn.Rotation:
    """Rotations, those of one row of a batch unlike those of the next."""
    if kind == "neighbours":
        freqs = fn.precompute_freqs_cis(dim, length + 2).to(DEVICE)
        return freqs[:length] if batch is None else torch.stack([freqs[i : i + length] for i in range(batch)])
    pair = fn.rope_tables(length + 2, dim, 10000, dtype=dtype, device=DEVICE)
    cos, sin = (t[:length] if batch is None else torch.stack([t[i : i + length] for i in range(batch)]) for t in pair)
    return cos, sin


@dtypes
@pytest.mark.parametrize("kind", ["halves", "neighbours"])
@pytest.mark.parametrize("dim, nq, nk, batched", [(8, 4, 1, False), (12, 3, 3, True), (128, 5, 2, False)])
def test_rotation(dtype: torch.dtype, kind: str, dim: int, nq: int, nk: int, batched: bool, served: list[str]) -> None:
    rotation = tables(kind, 3, dim, 2 if batched else None, torch.float32)
    q, k = numbers(0, 2, 3, nq, dim, dtype=dtype), numbers(1, 2, 3, nk, dim, dtype=dtype)
    compare(lambda q, k: fn.rotate_queries_and_keys(q, k, rotation), q, k, factor=2)
    assert served == 3 * ["rotate"]


def test_rotation_by_tables_whose_halves_differ_in_a_narrow_dtype(served: list[str]) -> None:
    cos, sin = numbers(2, 5, 6, dtype=torch.bfloat16), numbers(3, 5, 6, dtype=torch.bfloat16)
    compare(lambda x: fn.apply_rotary_pos_emb(x, cos, sin), numbers(0, 1, 5, 2, 6))
    assert served == 3 * ["rotate"]


@dtypes
@pytest.mark.parametrize("kind", ["halves", "neighbours"])
def test_rotation_of_strided_heads(dtype: torch.dtype, kind: str) -> None:
    rotation = tables(kind, 3, 8, None, torch.float32)
    packed, apart = numbers(0, 2, 3, 5, 8, dtype=dtype), numbers(1, 2, 3, 8, 2, dtype=dtype).transpose(2, 3)
    compare(lambda x: fn.rotate_queries_and_keys(x[:, :, 1:3], x[:, :, 3:], rotation), packed)
    compare(lambda q, k: fn.rotate_queries_and_keys(q, k, rotation), packed[:, :, 1:4], apart)

    def attended(q: Tensor, k: Tensor) -> Tensor:
        q, k = fn.rotate_queries_and_keys(q, k, rotation)
        return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)

    compare(attended, packed[:, :, :2], packed[:, :, 2:4], factor=2)


@pytest.mark.parametrize("kind", ["halves", "neighbours"])
def test_only_one_of_the_rotated_needs_a_gradient(kind: str) -> None:
    rotation, k = tables(kind, 3, 8, None, torch.float32), numbers(1, 2, 3, 1, 8)
    compare(lambda q: fn.rotate_queries_and_keys(q, k.to(q.dtype), rotation)[0], numbers(0, 2, 3, 2, 8), factor=2)


@dtypes
@pytest.mark.parametrize("width", [3, 24])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_embedding(dtype: torch.dtype, width: int, id_dtype: torch.dtype, served: list[str]) -> None:
    ids = torch.tensor([[4, 9, 3, 4, 4, 9], [0, 4, 4, 99, 6, 4]], dtype=id_dtype, device=DEVICE)
    before = ids.clone()
    y, grad = compare(lambda table: fn.shard_embedding(ids, table, 4), numbers(0, 6, width, dtype=dtype), factor=2)
    assert served == 3 * ["shard_embedding"] and torch.equal(ids, before)
    assert not y[(ids < 4) | (ids > 9)].any() and not grad[[1, 3, 4]].any()


def test_embedding_selects_rows_and_does_not_multiply() -> None:
    table, ids = numbers(0, 4, 3), torch.tensor([3, 4, 5, 8], device=DEVICE)
    table[0], table[1] = math.inf, math.nan
    grad = numbers(1, 4, 3)
    grad[0], grad[3] = math.inf, math.nan
    rows, dtable = results(lambda table: fn.shard_embedding(ids, table, 4), [table], [grad])
    assert torch.equal(rows[1], table[0]) and rows[2].isnan().all() and not rows[[0, 3]].any()
    assert torch.equal(dtable[:2], grad[1:3]) and not dtable[2:].any()


TARGETS = [3, 0, -100, 4099, 7]


@dtypes
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.01)])
@pytest.mark.parametrize("columns, vocab_size", [(4100, 4100), (4111, 4101)])
def test_cross_entropy(
    dtype: torch.dtype, smoothing: float, z_loss: float, columns: int, vocab_size: int, served: list[str]
) -> None:
    def f(logits: Tensor) -> Tensor:
        options: dict[str, Any] = {"vocab_size": vocab_size, "label_smoothing": smoothing, "z_loss": z_loss}
        return vocab_parallel_cross_entropy(logits, targets, group=None, reduction="none", **options)

    targets, logits = torch.tensor(TARGETS, device=DEVICE), numbers(0, 5, columns, dtype=dtype, scale=3)
    logits[:, vocab_size:] = math.nan
    before = logits.clone()
    _, grad = compare(f, logits, factor=2)
    forward = ["cross_entropy_statistics", "cross_entropy_losses"]
    assert served == forward + 2 * [*forward, "cross_entropy_gradient"]
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert not grad[2].any() and not grad[:, vocab_size:].any()


@dtypes
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_cross_entropy_of_a_shard_among_others(
    dtype: torch.dtype, num_shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of four has no real columns, one of two a few, the first far larger ones; tokens fill two programs."""
    monkeypatch.setattr(cross_entropy, "TOKENS", 2)
    logits, targets = numbers(0, 3, 76, dtype=dtype), torch.tensor([1, 40, 49], device=DEVICE)
    logits[0, :19] += 200

    def f(logits: Tensor) -> Tensor:
        options: dict[str, Any] = {"vocab_size": 50, "label_smoothing": 0.1, "z_loss": 0.01, "reduction": "none"}
        return vocab_parallel_cross_entropy(logits, targets, group=Group.single(num_shards), **options)

    compare(f, logits, factor=2)


@pytest.mark.parametrize("left_to_the_body", ["statistics", "losses", "gradient"])
def test_cross_entropy_partly_by_kernels(left_to_the_body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one pass is compiled and the other is not: they understand each other."""

    def lookup(op: str, *arguments: Any) -> Any:
        return None if op.endswith(left_to_the_body) else registry.lookup(op, *arguments)

    monkeypatch.setattr(loss_terms, "lookup", lookup)
    targets, logits = torch.tensor([1, 40, 49, 7], device=DEVICE), numbers(0, 4, 76)
    logits[0, 1], logits[1, :40] = -300, 20

    def f(logits: Tensor) -> Tensor:
        options: dict[str, Any] = {"vocab_size": 50, "label_smoothing": 0.1, "z_loss": 0.01, "reduction": "none"}
        return vocab_parallel_cross_entropy(logits, targets, group=Group.single(4), **options)

    compare(f, logits, factor=2)


@dtypes
@pytest.mark.parametrize("num_shards", [1, 2])
def test_cross_entropy_over_its_logits(dtype: torch.dtype, num_shards: int, served: list[str]) -> None:
    columns = 4112
    targets, grad = torch.tensor([3, 4099], device=DEVICE), numbers(1, 2)
    options: dict[str, Any] = {"vocab_size": columns - 5, "label_smoothing": 0.1, "z_loss": 0.01, "reduction": "none"}
    options |= {"group": Group.single(num_shards)}
    found = []
    for inplace in (False, True):
        leaf = numbers(0, 2, columns, dtype=dtype, scale=3).requires_grad_()
        logits = leaf * 1
        squares = logits.square().sum()
        loss = vocab_parallel_cross_entropy(logits, targets, inplace_backward=inplace, **options)
        loss.backward(grad, retain_graph=True)
        found.append(leaf.grad)
        assert torch.equal(logits.detach(), leaf.grad if inplace else leaf.detach())
    assert served.count("cross_entropy_gradient") == 2 and torch.equal(*found)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@dtypes
def test_linear_cross_entropy(dtype: torch.dtype, served: list[str]) -> None:
    hidden, weight = numbers(0, 5, 16, dtype=dtype), numbers(1, 74, 16, dtype=dtype)
    targets = torch.tensor(TARGETS, device=DEVICE) % 70

    def f(hidden: Tensor, weight: Tensor, block_tokens: int | None) -> Tensor:
        options: dict[str, Any] = {"group": Group.single(2), "vocab_size": 70, "reduction": "none"}
        return vocab_parallel_linear_cross_entropy(hidden, weight, targets, block_tokens=block_tokens, **options)

    for block_tokens in (None, 2):
        compare(partial(f, block_tokens=block_tokens), hidden, weight, factor=8)
    assert served.count("cross_entropy_gradient") == 2 * (1 + 2 * 3)  # two runs; of three blocks each shard's own


@dtypes
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_cross_entropy_far_from_zero_and_with_no_chance(dtype: torch.dtype, offset: float) -> None:
    logits = (numbers(0, 4, 37, scale=4).round() + offset).to(dtype)
    targets = torch.tensor([1, 5, 36, 9], device=DEVICE)
    logits[0, 2:30] = -math.inf
    logits[2, :36] = -math.inf
    loss_, grad = compare(lambda x: vocab_parallel_cross_entropy(x, targets, group=None, reduction="none"), logits)
    assert loss_.isfinite().all() and grad.isfinite().all() and loss_[2] == 0


@dtypes
@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("offset", [0.0, 2.0**14])
def test_cross_entropy_of_targets_far_below(
    dtype: torch.dtype, num_shards: int, smoothing: float, offset: float
) -> None:
    """In the shard of the row's maximum and in another; each loss is held against its own size."""
    targets = torch.tensor([3, 40, 3, 40, 3, 40, 5], device=DEVICE)
    logits = numbers(0, 7, 44).round() + offset
    logits[:, 4] += 16
    logits[[0, 1], targets[:2]] -= 1e3
    logits[[2, 3], targets[2:4]] = -3e4
    logits[[4, 5], targets[4:6]] = -3e4 if smoothing else -math.inf
    logits = logits.to(dtype)

    def f(logits: Tensor) -> Tensor:
        options: dict[str, Any] = {"vocab_size": 42, "label_smoothing": smoothing, "reduction": "none"}
        return vocab_parallel_cross_entropy(logits, targets, group=Group.single(num_shards), **options)

    loss, _ = compare(f, logits, factor=2)
    torch.testing.assert_close(loss.double(), f(logits.double()), rtol=2e-6, atol=2e-5)


def test_cross_entropy_gradient_takes_any_scale() -> None:
    logits, targets = numbers(0, 3, 37, dtype=torch.float16), torch.tensor([1, 5, 36], device=DEVICE)
    f = lambda x: vocab_parallel_cross_entropy(x, targets, group=None, label_smoothing=0.1)  # noqa: E731
    compare(f, logits, scale=1000)


@dtypes
@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.01)])
def test_cross_entropy_of_rows_of_minus_infinity(
    dtype: torch.dtype, num_shards: int, smoothing: float, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one of two shards, with the target there and elsewhere, in all of them, beside a NaN and beside the lowest
    number; kept and ignored, once with an infinite gradient.

    As the body of the same dtype has it: the log-sum-exp of such a row depends on that.
    """
    targets = torch.tensor([30, 3, 3, 30, 3, 30, -100, -100], device=DEVICE)
    logits, grad = numbers(0, 8, 40, dtype=dtype), numbers(1, 8)
    logits[[0, 1, 6], :20] = logits[2:6] = logits[7] = -math.inf
    logits[4, 3], logits[5, 30], grad[7] = torch.finfo(torch.float32).min, math.nan, math.inf

    def f(logits: Tensor) -> Tensor:
        options: dict[str, Any] = {"vocab_size": 37, "label_smoothing": smoothing, "z_loss": z_loss}
        group = Group.single(num_shards)
        return vocab_parallel_cross_entropy(logits, targets, group=group, reduction="none", **options)

    got = results(f, [logits], [grad])
    monkeypatch.setattr(registry, "DEVICES", ())
    for kernel, body in zip(got, results(f, [logits], [grad]), strict=True):
        tolerance = 2 * EPSILON[dtype]
        torch.testing.assert_close(kernel, body, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert not got[0][6:].any() and not got[1][6:].any()
    assert got[1][5].isnan().any() and not got[1][:5].isnan().any()
