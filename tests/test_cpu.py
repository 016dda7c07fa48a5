"""The faster CPU bodies against the plain ones: forward bit for bit, gradients against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from src import functional as fn
from src import memory
from src.kernels import cpu_embedding, cpu_linear, cpu_norm, cpu_rope, lookup, row_blocks
from src.testing import Ranks
from tests import test_same_bits

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["one block", "blocks", "rows"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one block, in several with a shorter last one, and row by row."""
    elements = {"one block": 2**20, "blocks": 200, "rows": 1}[request.param]
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(cpu_linear, "WEIGHT_ELEMENTS", elements)


@pytest.fixture(autouse=True)
def no_tensor_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for home in (cpu_embedding, cpu_norm, cpu_rope):
        monkeypatch.setattr(home, "MIN_ELEMENTS", 1)
    monkeypatch.setattr(cpu_norm, "MIN_ELEMENTS_FORWARD", 1)


def plain(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``call`` with the bodies of ``functional``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fn, "lookup", lambda op, *arguments: None)
        return call(*args, **options)


def gradients(call: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Those of ``call(*leaves)`` in the leaves."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    call(*leaves).backward(grad)
    return [leaf.grad for leaf in leaves]


def check_gradients(call: Callable[..., Tensor], leaves: list[Tensor], scale: float = 1.0) -> None:
    """Gradients in the leaves' dtype against the plain body's in float64."""
    grad = numbers(9, *call(*leaves).shape, dtype=leaves[0].dtype)
    got = gradients(call, leaves, grad)
    want = plain(gradients, call, [leaf.double() for leaf in leaves], grad.double())
    coarsest = max(torch.finfo(leaf.dtype).eps for leaf in leaves)
    tolerance = scale * coarsest * (32 if coarsest < 1e-5 else 4)
    for leaf, mine, theirs in zip(leaves, got, want, strict=True):
        assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


def norm_formula(x: Tensor, weight: Tensor, size: int) -> Tensor:
    """Groups of ``size`` channels, eps 1e-5, every operation apart."""
    groups = x.to(fn.wide(x.dtype)).unflatten(-1, (-1, size))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + 1e-5)
    return ((groups * scale).flatten(-2) * weight).to(x.dtype)


NORM_SHAPES = [(1,), (7,), (48,), (1, 48), (33, 48), (2, 17, 48), (3, 1, 5, 130), (1, 1, 1024), (5, 4096), (300, 8)]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", NORM_SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm_has_the_bits_of_the_plain_body(
    shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, weight = numbers(0, *shape, dtype=dtype), numbers(1, shape[-1]).to(weight_dtype) / 3
    for size in {size for size in (1, 2, 3, 13, 16, 128, shape[-1]) if shape[-1] % size == 0}:
        want = norm_formula(x, weight, size)
        assert torch.equal(fn.group_rms_norm(x, weight, size, 1e-5), want)
        learning = fn.group_rms_norm(x.clone().requires_grad_(), weight, size, 1e-5)
        assert torch.equal(learning, want) and learning.dtype == dtype and learning.shape == shape


@pytest.mark.parametrize("dtype", FLOATS)
@torch.no_grad()
def test_norm_of_a_small_tensor_in_one_call(dtype: torch.dtype) -> None:
    for shape in NORM_SHAPES:
        x, weight = numbers(0, *shape, dtype=dtype), numbers(1, shape[-1], dtype=dtype)
        for strided in (x, numbers(0, *shape, 2, dtype=dtype)[..., 0]):
            got, want = plain(fn.rms_norm, strided, weight, 1e-5), norm_formula(strided, weight, shape[-1])
            assert torch.equal(got, want)


@pytest.mark.parametrize("size", [48, 16])
def test_gradient_of_a_small_norm_is_one_term(size: int) -> None:
    """A sum with the gradient of a residual must not depend on what lies between the two."""

    def block(x: Tensor, weight: Tensor, apart: bool) -> Tensor:
        x = x * 1
        return plain(fn.group_rms_norm, x.view_as(x) if apart else x, weight, size, 1e-5) + x

    leaves, grad = [numbers(0, 3, 40, 48), numbers(1, 48)], numbers(2, 3, 40, 48)
    together, apart = (gradients(lambda x, w, on=on: block(x, w, on), leaves, grad) for on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(3, 65536), (4, 262144), (5, 20000), (257, 4096)])
def test_norm_of_wide_rows_by_several_threads(shape: tuple[int, ...], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = numbers(0, *shape, dtype=dtype), numbers(1, shape[-1])
            for call in (fn.rms_norm, lambda *arguments: plain(fn.rms_norm, *arguments)):
                assert torch.equal(call(x, weight, 1e-5), norm_formula(x, weight, shape[-1]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 6, 24])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 7, 24)])
def test_norm_gradients(dtype: torch.dtype, size: int, shape: tuple[int, ...]) -> None:
    leaves = [numbers(0, *shape, dtype=dtype), numbers(1, 24, dtype=dtype)]
    check_gradients(lambda x, weight: fn.group_rms_norm(x, weight, size, 1e-3), leaves)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 9, 3, 8), (3, 5, 1, 6), (1, 64, 4, 128)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotation(shape: tuple[int, ...], dtype: torch.dtype, table_dtype: torch.dtype, per_row: bool) -> None:
    table_shape = (*shape[:2], shape[3]) if per_row else (shape[1], shape[3])
    cos, sin = numbers(1, *table_shape, dtype=table_dtype), numbers(2, *table_shape, dtype=table_dtype)
    x = numbers(0, *shape, dtype=dtype)
    got = fn.apply_rotary_pos_emb(x, cos, sin)
    assert got.dtype == dtype and torch.equal(got, plain(fn.apply_rotary_pos_emb, x, cos, sin))
    check_gradients(lambda x: fn.apply_rotary_pos_emb(x, cos, sin), [x])
    call = (gradients, lambda x: fn.apply_rotary_pos_emb(x, cos, sin), [x], numbers(3, *shape, dtype=dtype))
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(call[0](*call[1:])[0], plain(*call)[0])


def test_tables_of_a_rotation_may_learn() -> None:
    x, cos, sin = numbers(0, 2, 3, 2, 4), numbers(1, 3, 4), numbers(2, 3, 4)
    check_gradients(fn.apply_rotary_pos_emb, [x, cos, sin])


IDS = {
    "some": [[3, 4, 5, 7], [8, 5, 9, 0]],
    "none": [[0, 9], [8, 3]],
    "all": [[4, 5], [7, 7]],
    "no ids": [[]],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_shard_embedding(ids: list[list[int]], ids_dtype: torch.dtype, dtype: torch.dtype) -> None:
    given, table = torch.tensor(ids, dtype=ids_dtype), numbers(0, 4, 3, dtype=dtype)
    check_gradients(lambda table: fn.shard_embedding(given, table, 4), [table])
    table[0, 0], table[1, 1] = torch.inf, torch.nan
    got, want = fn.shard_embedding(given, table, 4), plain(fn.shard_embedding, given, table, 4)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 300, 5000])
def test_a_tables_gradient_has_the_bits_of_the_plain_body(dtype: torch.dtype, count: int) -> None:
    ids = torch.randint(-20, 84, (count,), generator=torch.Generator().manual_seed(0))
    table, grad = numbers(1, 64, 40, dtype=dtype), numbers(2, count, 40, dtype=dtype)
    got = gradients(lambda table: fn.shard_embedding(ids, table, 0), [table], grad)
    assert torch.equal(got[0], plain(gradients, lambda table: fn.shard_embedding(ids, table, 0), [table], grad)[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_results_are_placed_like_torchs(dtype: torch.dtype) -> None:
    shape = torch.Size([memory.HUGE_BYTES + 1])
    for tensor in (memory.empty_like(torch.empty(shape, dtype=dtype)), memory.zeros(shape, dtype)):
        assert (tensor.shape, tensor.dtype, tensor.data_ptr() % 64) == (shape, dtype, 0)
    assert not tensor.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 300, 5000])
def test_a_rows_gradient_does_not_depend_on_how_the_table_is_cut(dtype: torch.dtype, count: int) -> None:
    ids = torch.randint(64, (count,), generator=torch.Generator().manual_seed(0))
    table, grad = numbers(1, 64, 40, dtype=dtype), numbers(2, count, 40, dtype=dtype)
    (whole,) = gradients(lambda table: fn.shard_embedding(ids, table, 0), [table], grad)
    for width in (1, 8, 32):
        for first in range(0, 64, width):
            part = gradients(
                lambda part, first=first: fn.shard_embedding(ids, part, first), [table[first : first + width]], grad
            )
            assert torch.equal(part[0], whole[first : first + width])


def wide_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "has_bfloat16_units", lambda: False)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", [(8, 12), (2, 9, 12), (2, 2, 4, 12)])
@pytest.mark.parametrize("biased", [False, True])
def test_bfloat16_products_round_once(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], biased: bool) -> None:
    wide_only(monkeypatch)
    leaves = [numbers(0, *shape, dtype=torch.bfloat16), numbers(1, 20, 12, dtype=torch.bfloat16)]
    leaves += [numbers(2, 20, dtype=torch.bfloat16)] if biased else []
    y, want = fn.linear(*leaves), F.linear(*(leaf.double() for leaf in leaves))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-6)
    check_gradients(fn.linear, leaves)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_products_under_autocast(monkeypatch: pytest.MonkeyPatch, x_dtype: torch.dtype) -> None:
    wide_only(monkeypatch)
    leaves = [numbers(0, 9, 300, dtype=x_dtype), numbers(1, 20, 300), numbers(2, 20)]
    grad, rounded = numbers(3, 9, 20, dtype=torch.bfloat16), [leaf.bfloat16() for leaf in leaves]
    want, want_gradients = fn.linear(*rounded), gradients(fn.linear, rounded, grad)
    product, cast = F.linear, []

    def watched(*operands: Tensor) -> Tensor:
        cast.append(torch.is_autocast_enabled("cpu"))
        return product(*operands)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fn.linear(*(leaf.double() for leaf in leaves)).dtype == torch.float64
        monkeypatch.setattr(F, "linear", watched)
        assert torch.equal(fn.linear(*leaves), want)
        got = gradients(fn.linear, leaves, grad)
    assert cast == [False, False]
    for leaf, mine, theirs in zip(leaves, got, want_gradients, strict=True):
        assert torch.equal(mine, theirs.to(leaf.dtype))


def test_bfloat16_products_of_strided_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_only(monkeypatch)
    x, weight = numbers(0, 9, 2, 12, dtype=torch.bfloat16).transpose(0, 1), numbers(1, 20, 12, dtype=torch.bfloat16)
    assert torch.equal(fn.linear(x, weight), fn.linear(x.contiguous(), weight))


def test_other_products_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(8, torch.float32), (1, torch.bfloat16), (8, torch.float16)]
    want = [F.linear(numbers(0, n, 12, dtype=dtype), numbers(1, 20, 12, dtype=dtype)) for n, dtype in cases]
    wide_only(monkeypatch)
    monkeypatch.setattr(cpu_linear, "_WideLinear", None)
    for (n, dtype), y in zip(cases, want, strict=True):
        assert torch.equal(fn.linear(numbers(0, n, 12, dtype=dtype), numbers(1, 20, 12, dtype=dtype)), y)


def everything(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """All bodies in one function of ``x [2, 3, 8]``."""
    cos, sin = fn.rope_tables(3, 4, 10000)
    x = fn.rms_norm(x + fn.shard_embedding(torch.tensor([[0, 5, 2], [9, 1, 0]]), table, 0), weight, 1e-5)
    return fn.linear(fn.apply_rotary_pos_emb(x.unflatten(-1, (2, 4)), cos, sin).flatten(-2), weight.outer(weight))


LEAVES = [numbers(0, 2, 3, 8), numbers(1, 8), numbers(2, 6, 8)]


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize("sequence_parallel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_has_the_same_bits_at_every_size(
    monkeypatch: pytest.MonkeyPatch, ranks: Ranks, dtype: torch.dtype, sequence_parallel: bool
) -> None:
    wide_only(monkeypatch)
    args = replace(test_same_bits.DENSE, rope_pairing="halves", tie_embeddings=True)
    run = (test_same_bits.train, args, sequence_parallel, dtype)
    want = test_same_bits.whole(ranks.on("simulated", 1)(*run, num_shards=8))
    slow = test_same_bits.whole(plain(ranks.on("simulated", 1), *run, num_shards=8))
    assert dtype == torch.bfloat16 or torch.equal(want["logits"], slow["logits"])
    assert any(not torch.equal(want[name], slow[name]) for name in want)
    for world_size in (2, 4, 8):
        got = test_same_bits.whole(ranks.on("simulated", world_size)(*run, num_shards=8))
        assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations(use_reentrant: bool) -> None:
    grad = numbers(3, 2, 3, 8)
    want = gradients(everything, LEAVES, grad)
    got = gradients(lambda *leaves: checkpoint(everything, *leaves, use_reentrant=use_reentrant), LEAVES, grad)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiled_in_one_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    grad = numbers(3, 2, 3, 8)
    torch.testing.assert_close(gradients(compiled, LEAVES, grad), gradients(everything, LEAVES, grad))


def test_without_gradients_and_copied() -> None:
    want = everything(*(leaf.clone().requires_grad_() for leaf in LEAVES)).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = everything(*LEAVES)
            assert torch.equal(copy.deepcopy(got), want)


def test_strided() -> None:
    x, ids = numbers(0, 5, 3, 4, 8).transpose(0, 1), torch.arange(12).view(3, 4).T
    weight, table, (cos, sin) = numbers(1, 8), numbers(2, 9, 8), fn.rope_tables(5, 8, 1e4)
    check_gradients(lambda x: fn.rms_norm(x, weight, 1e-3), [x])
    for call in (
        lambda: fn.rms_norm(x, weight, 1e-3),
        lambda: fn.apply_rotary_pos_emb(x, cos, sin),
        lambda: fn.shard_embedding(ids, table, 2),
    ):
        assert torch.equal(call(), plain(call))
    y = fn.apply_rotary_pos_emb(leaf := x.contiguous().requires_grad_(), cos, sin)
    y.sum().backward()  # an expanded gradient
    torch.testing.assert_close(
        leaf.grad, plain(gradients, lambda x: fn.apply_rotary_pos_emb(x, cos, sin), [x], x * 0 + 1)[0]
    )


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    fn.rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    assert x.grad is not None and x.grad.shape == shape


def test_the_registry_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = numbers(0, 3, 8), numbers(1, 8)
    heads, tables = numbers(2, 1, 3, 2, 8), fn.rope_tables(3, 8, 1e4)
    assert lookup("group_rms_norm", x, weight, 4) is cpu_norm.group_rms_norm
    assert lookup("shard_embedding", torch.zeros(3, dtype=torch.int64), x) is cpu_embedding.shard_embedding
    assert lookup("rotate", (heads,), tables) is cpu_rope.rotate
    assert lookup("rotate", (heads,), (fn.precompute_freqs_cis(8, 3),)) is None
    assert lookup("swiglu", x, x) is None
    wide_only(monkeypatch)
    assert lookup("linear", x.bfloat16(), weight.bfloat16(), None) is None
    assert lookup("linear", numbers(0, 8, 8).bfloat16(), weight.outer(weight).bfloat16(), None) is cpu_linear.linear


class Subclass(Tensor):
    pass


OTHERS = [numbers(1, 8).to("meta"), numbers(1, 8).as_subclass(Subclass), numbers(1, 8).double()]


@pytest.mark.parametrize("weight", OTHERS, ids=["elsewhere", "subclass", "wider"])
def test_the_registry_leaves_the_rest_to_the_body(weight: Tensor) -> None:
    assert lookup("group_rms_norm", numbers(0, 3, 8), weight, 4) is None


def test_transforms_see_the_body() -> None:
    x, weight = numbers(0, 3, 8), numbers(1, 8)
    (want,) = gradients(lambda x: fn.group_rms_norm(x, weight, 4, 1e-3), [x], torch.ones(3, 8))
    got = torch.func.grad(lambda x: fn.group_rms_norm(x, weight, 4, 1e-3).sum())(x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("op", ["norm", "groups", "rotation", "embedding"])
def test_results_may_be_modified_in_place(monkeypatch: pytest.MonkeyPatch, op: str, large: bool) -> None:
    if large:
        monkeypatch.setattr(memory, "HUGE_BYTES", 1)
    x, weight, heads = numbers(0, 2, 6, 8), numbers(1, 8), numbers(2, 2, 6, 2, 8)
    tables, ids = fn.rope_tables(6, 8, 1e4), torch.arange(12).view(2, 6) % 7
    call, leaf = {
        "norm": (lambda x: fn.rms_norm(x, weight, 1e-3), x),
        "groups": (lambda x: fn.group_rms_norm(x, weight, 4, 1e-3), x),
        "rotation": (lambda x: fn.apply_rotary_pos_emb(x, *tables), heads),
        "embedding": (lambda table: fn.shard_embedding(ids, table, 1), numbers(3, 5, 8)),
    }[op]
    grad = numbers(4, *call(leaf).shape)
    (got,) = gradients(lambda leaf: call(leaf).mul_(2).exp_(), [leaf], grad)
    (want,) = gradients(lambda leaf: (call(leaf) * 2).exp(), [leaf], grad)
    assert torch.equal(got, want)


def test_rotations_whose_tables_do_not_fit() -> None:
    q, k = numbers(0, 2, 6, 2, 8), numbers(1, 2, 6, 1, 8)
    cos, sin = fn.rope_tables(6, 8, 1e4)
    for tables in ((cos[:1], sin[:1]), (cos, sin[:1]), (cos[:, :1], sin[:, :1]), (cos[:5], sin[:5])):
        with pytest.raises(ValueError, match=r"must both be \[s, hd\]"):
            fn.rotate_queries_and_keys(q, k, tables)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_sees_the_body() -> None:
    x, weight, tangent = numbers(0, 3, 8), numbers(1, 8), numbers(2, 3, 8)

    def norm(x: Tensor) -> Tensor:
        return fn.group_rms_norm(x, weight, 4, 1e-3)

    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(got, torch.func.jvp(norm, (x,), (tangent,))[1])


def test_a_bfloat16_product_without_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_only(monkeypatch)
    assert fn.linear(torch.ones(16, 4, dtype=torch.bfloat16), torch.ones(0, 4, dtype=torch.bfloat16)).shape == (16, 0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_norm_of_which_one_part_learns(frozen: int) -> None:
    leaves, grad = [numbers(0, 3, 8), numbers(1, 8)], numbers(2, 3, 8)
    want = gradients(lambda x, w: fn.group_rms_norm(x, w, 4, 1e-3), leaves, grad)[1 - frozen]
    leaf = leaves[1 - frozen].clone().requires_grad_()
    fn.group_rms_norm(*([leaf, leaves[1]] if frozen else [leaves[0], leaf]), 4, 1e-3).backward(grad)
    assert torch.equal(leaf.grad, want)
