"""The mathematics of the layers against float64 numpy, values and gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from src import functional as fn

Array = NDArray[Any]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, want: Array, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.detach().double(), torch.from_numpy(want), rtol=tolerance, atol=tolerance)


def array(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().double().numpy() for tensor in tensors]


def norm_oracle(x: Array, weight: Array, grad: Array, size: int, eps: float) -> tuple[Array, Array, Array]:
    """Output, gradient of x and gradient of weight of the RMS norm over runs of ``size`` channels."""
    xs, pulled = (a.reshape(*x.shape[:-1], -1, size) for a in (x, grad * weight))
    scale = 1 / np.sqrt((xs**2).mean(-1, keepdims=True) + eps)
    normed = (xs * scale).reshape(x.shape)
    x_grad = pulled * scale - xs * scale**3 * (pulled * xs).mean(-1, keepdims=True)
    return normed * weight, x_grad.reshape(x.shape), (grad * normed).reshape(-1, x.shape[-1]).sum(0)


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize("size", [1, 4, 12])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_norm_against_numpy(shape: tuple[int, ...], size: int, eps: float) -> None:
    x, weight, grad = numbers(0, *shape).requires_grad_(), numbers(1, 12).requires_grad_(), numbers(2, *shape)
    y = fn.rms_norm(x, weight, eps) if size == 12 else fn.group_rms_norm(x, weight, size, eps)
    y.backward(grad)
    want = norm_oracle(*array(x, weight, grad), size, eps)
    for got, expected in zip((y, x.grad, weight.grad), want, strict=True):
        close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_norm_rounds_once_after_gamma(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = numbers(0, 64, 32, dtype=dtype), numbers(1, 32, dtype=weight_dtype)
    wide = x if dtype == torch.float64 else x.float()
    want = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5) * weight
    assert torch.equal(fn.rms_norm(x, weight, 1e-5), want.to(dtype))


@pytest.mark.parametrize("value", [300.0, 4096.0, 60000.0])
def test_norm_of_large_half_activations_is_finite(value: float) -> None:
    x = torch.linspace(-value, value, 16).half().requires_grad_()
    weight, grad = numbers(1, 16), numbers(2, 16, dtype=torch.float16)
    y = fn.group_rms_norm(x, weight, 8, 1e-5)
    y.backward(grad)
    want, x_grad, _ = norm_oracle(*array(x, weight, grad), 8, 1e-5)
    close(y, want, 1e-3)
    torch.testing.assert_close(x.grad.double(), torch.from_numpy(x_grad), rtol=1e-2, atol=1e-7)


def test_swiglu() -> None:
    gate, up, grad = numbers(0, 4, 6).requires_grad_(), numbers(1, 4, 6).requires_grad_(), numbers(2, 4, 6)
    y = fn.swiglu(gate, up)
    y.backward(grad)
    g, u, d = array(gate, up, grad)
    sigmoid = 1 / (1 + np.exp(-g))
    close(y, g * sigmoid * u)
    close(gate.grad, d * u * sigmoid * (1 + g * (1 - sigmoid)))
    close(up.grad, d * g * sigmoid)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 4e-3)])
def test_sinusoidal_pos_emb(dtype: torch.dtype, tolerance: float) -> None:
    got = fn.sinusoidal_pos_emb(40, 6, base=500.0, dtype=dtype)
    want = np.empty((40, 6))
    for position in range(40):
        for i in range(3):
            angle = position / 500.0 ** (2 * i / 6)
            want[position, 2 * i : 2 * i + 2] = math.sin(angle), math.cos(angle)
    assert got.dtype == dtype
    close(got, want, tolerance)


def rope_formula(length: int, dim: int, base: float, ratio: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tables in the order of operations that decides their bits."""
    base_k = base if ratio == 1 else base * ratio ** (dim / (dim - 2))
    inv = 1.0 / (base_k ** (torch.arange(0, dim, 2).to(dtype) / dim))
    freqs = torch.outer(torch.arange(length).to(dtype), inv)
    angles = torch.cat((freqs, freqs), -1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dim, base, ratio", [(64, 10000, 1), (128, 10000, 2), (6, 500000.0, 8), (96, 1e4, 3.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rope_tables_bits(dim: int, base: float, ratio: float, dtype: torch.dtype) -> None:
    want = rope_formula(700, dim, base, ratio, torch.promote_types(dtype, torch.float32))
    for got, table in zip(fn.rope_tables(700, dim, base, ratio, dtype), want, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, table.to(dtype))


@pytest.mark.parametrize("ratio", [1, 4])
def test_rope_tables_against_numpy(ratio: int) -> None:
    """In the NTK paper's words: beta * ratio^(2 / (d - 2)) in place of beta = base^(2 / d)."""
    beta = 10000.0 ** (2 / 16) * ratio ** (2 / 14)
    angles = np.outer(np.arange(40), beta ** -np.arange(8.0))
    cos, sin = fn.rope_tables(40, 16, 10000, ratio)
    close(cos, np.cos(np.tile(angles, 2)))
    close(sin, np.sin(np.tile(angles, 2)))


def rotated_halves(x: Array, angles: Array) -> Array:
    first, second = np.split(x, 2, -1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def rotated_neighbours(x: Array, angles: Array) -> Array:
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


@pytest.mark.parametrize("pairing", ["halves", "neighbours"])
def test_rotation_against_numpy(pairing: str) -> None:
    x, grad = numbers(0, 2, 9, 3, 8).requires_grad_(), numbers(1, 2, 9, 3, 8)
    angles = np.outer(np.arange(9), 10000.0 ** -(np.arange(4) / 4))
    if pairing == "halves":
        y, oracle = fn.apply_rotary_pos_emb(x, *fn.rope_tables(9, 8, 10000)), rotated_halves
    else:
        y, oracle = fn.rotate_neighbours(x, fn.precompute_freqs_cis(8, 9, 10000.0)), rotated_neighbours
    y.backward(grad)
    close(y, oracle(*array(x), angles))
    close(x.grad, oracle(*array(grad), -angles))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64])
def test_rotation_in_the_tables_dtype_with_one_rounding(dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    x = numbers(0, 2, 9, 3, 8, dtype=dtype)
    cos, sin = (table[:, None] for table in rope_formula(9, 8, 10000, 1, table_dtype))
    wide = x.to(table_dtype)
    want = wide * cos + torch.cat((-wide[..., 4:], wide[..., :4]), -1) * sin
    got = fn.apply_rotary_pos_emb(x, *fn.rope_tables(9, 8, 10000, dtype=table_dtype))
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_rotation_has_the_same_bits(dtype: torch.dtype) -> None:
    cos, sin = numbers(1, 2, 6, 8).unbind()  # halves that differ, as no table of ours does
    compiled = torch.compile(fn.apply_rotary_pos_emb, fullgraph=True, backend="eager")
    results = []
    for rotate in (fn.apply_rotary_pos_emb, compiled):
        x = numbers(0, 2, 6, 3, 8, dtype=dtype).requires_grad_()
        y = rotate(x, cos, sin)
        y.backward(numbers(2, 2, 6, 3, 8, dtype=dtype))
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    assert all(map(torch.equal, *results))


def test_rotating_neighbours_in_bfloat16_rounds_once() -> None:
    x, freqs = numbers(0, 2, 9, 3, 8, dtype=torch.bfloat16), fn.precompute_freqs_cis(8, 9)
    assert freqs.dtype == torch.complex64
    assert torch.equal(fn.rotate_neighbours(x, freqs), fn.rotate_neighbours(x.float(), freqs).bfloat16())


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_pairing_permutation(shape: tuple[int, ...]) -> None:
    rows, order = numbers(0, *shape), [0, 2, 4, 6, 1, 3, 5, 7]
    halves = fn.neighbours_to_halves(rows, num_heads=3)
    assert torch.equal(halves, rows[[8 * head + row for head in range(3) for row in order]])
    assert torch.equal(fn.halves_to_neighbours(halves, num_heads=3), rows)


def scores(pairing: str, query: Tensor, key: Tensor, x: Tensor) -> Tensor:
    q, k = ((x @ weight.T).unflatten(-1, (-1, 8)) for weight in (query, key))
    if pairing == "halves":
        tables = fn.rope_tables(7, 8, 500000.0)
        q, k = fn.apply_rotary_pos_emb(q, *tables), fn.apply_rotary_pos_emb(k, *tables)
    else:
        freqs = fn.precompute_freqs_cis(8, 7, 500000.0)
        q, k = fn.rotate_neighbours(q, freqs), fn.rotate_neighbours(k, freqs)
    return torch.einsum("bqhd,bkhd->bhqk", q, k)


@pytest.mark.parametrize("given", ["neighbours", "halves"])
def test_attention_scores_agree_under_both_pairings(given: str) -> None:
    x, grad, weights = numbers(0, 2, 7, 12), numbers(1, 2, 3, 7, 7), [numbers(2, 24, 12), numbers(3, 24, 12)]
    permute = fn.neighbours_to_halves if given == "neighbours" else fn.halves_to_neighbours
    other = "halves" if given == "neighbours" else "neighbours"
    found = []
    for pairing, reorder in ((given, lambda weight, _: weight), (other, permute)):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        value = scores(pairing, *(reorder(leaf, 3) for leaf in leaves), x)
        value.backward(grad)
        found.append([value, leaves[0].grad, leaves[1].grad])
    for first, second in zip(*found, strict=True):
        close(second, *array(first), tolerance=1e-4)
    assert not torch.allclose(scores(other, *weights, x), found[0][0], atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shard_embedding(dtype: torch.dtype) -> None:
    table = numbers(0, 4, 3)
    table[0], table[2] = math.inf, math.nan
    ids = torch.tensor([[3, 4, 5, 7], [8, 5, 9, 0]], dtype=dtype)
    before, leaf = ids.clone(), table.clone().requires_grad_()
    grad = torch.arange(24.0).view(2, 4, 3)
    grad[0, 0] = math.inf
    rows = fn.shard_embedding(ids, leaf, first=4)
    rows.backward(grad)
    want, want_grad = np.zeros((2, 4, 3)), np.zeros((4, 3))
    for place in np.ndindex(2, 4):
        if 4 <= ids[place] < 8:
            want[place] = table[ids[place] - 4]
            want_grad[ids[place] - 4] += grad[place].numpy()
    assert np.array_equal(rows.detach().numpy(), want, equal_nan=True)
    assert np.array_equal(leaf.grad.numpy(), want_grad)
    assert torch.equal(ids, before)


@pytest.mark.parametrize("length, start_pos", [(1, 0), (5, 0), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_mask(length: int, start_pos: int, dtype: torch.dtype) -> None:
    want = [
        [0 if key <= start_pos + query else -math.inf for key in range(start_pos + length)] for query in range(length)
    ]
    mask = fn.causal_mask(length, start_pos, dtype=dtype, device=torch.device("cpu"))
    assert mask.dtype == dtype
    assert torch.equal(mask, torch.tensor(want, dtype=dtype))


def rotate(*shapes: tuple[int, ...]) -> Tensor:
    return fn.apply_rotary_pos_emb(*map(torch.zeros, shapes))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fn.sinusoidal_pos_emb(4, 5), r"dim=5 must be even"),
        (lambda: fn.rope_tables(4, 7, 10000), r"dim=7 must be even"),
        (lambda: fn.rope_tables(4, 7, 10000, 2), r"dim=7 must be even"),
        (lambda: fn.rope_tables(4, 0, 10000), r"dim=0 must be even and at least 2"),
        (lambda: fn.rope_tables(4, 2, 10000, 2), r"dim=2 .* ratio=2; use dim >= 4"),
        (lambda: fn.precompute_freqs_cis(7, 4), r"dim=7 must be even"),
        (lambda: rotate((1, 3, 2, 8), (4, 8), (4, 8)), r"cos \[4, 8\] .* \[3, 8\] .* \[1, 3, 2, 8\]"),
        (lambda: rotate((1, 3, 2, 8), (3, 8), (3, 4)), r"sin \[3, 4\] .* \[3, 8\]"),
        (lambda: rotate((1, 3, 2, 8), (3, 4), (3, 4)), r"cos \[3, 4\] .* \[3, 8\]"),
        (lambda: rotate((1, 3, 2, 7), (3, 7), (3, 7)), r"7\b.* even|even.* 7\b"),
        (lambda: fn.neighbours_to_halves(torch.zeros(24, 5), 5), "24.* num_heads=5|num_heads=5.* 24"),
        (lambda: fn.halves_to_neighbours(torch.zeros(24, 5), 5), "24.* num_heads=5|num_heads=5.* 24"),
        (lambda: fn.rotate_neighbours(torch.zeros(1, 3, 2, 8), fn.precompute_freqs_cis(8, 4)), r"\[3, 4\] .* \[4, 4\]"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_fillers_are_seen_by_themselves_alone() -> None:
    """A row of the mask without any 0 would make NaN, and NaN would reach all others."""
    padding = torch.tensor([0, 2, 4])
    mask = fn.causal_mask(3, 2, padding=padding, dtype=torch.float32, device=torch.device("cpu"))
    assert mask.shape == (3, 1, 3, 5)
    for row, fillers in enumerate(padding.tolist()):
        for query, key in itertools.product(range(3), range(5)):
            seen = fillers <= key <= query + 2 or key == query + 2
            assert mask[row, 0, query, key] == (0 if seen else -math.inf)
