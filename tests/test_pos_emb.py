"""Rotary embeddings as modules: values, growth, and tables that keep dtype and device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from src.modeling import ModelArgs, NTKAwareRoPE, RotaryFrequencies
from src.rope_scaling import rope_frequencies

DIM, MAX = 8, 8


def numbers(length: int, dim: int = DIM, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, length, 3, dim, generator=torch.Generator().manual_seed(length)).to(dtype)


def formula(length: int, ratio: float = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin of the first ``length`` positions, in the order of operations that decides their bits."""
    base = 10000 if ratio == 1 else 10000 * ratio ** (DIM / (DIM - 2))
    inv = 1.0 / (base ** (torch.arange(0, DIM, 2).to(dtype) / DIM))
    freqs = torch.outer(torch.arange(length).to(dtype), inv)
    angles = torch.cat((freqs, freqs), -1)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, ratio: float = 1, offset: int = 0) -> Tensor:
    """``x`` rotated by tables of float32, bit for bit."""
    cos, sin = (table[offset:, None] for table in formula(offset + x.shape[1], ratio))
    wide = x.float()
    turned = torch.cat((-wide[..., DIM // 2 :], wide[..., : DIM // 2]), -1)
    return (wide * cos + turned * sin).to(x.dtype)


@pytest.mark.parametrize("dim, base, ratio, offset", [(8, 10000, 1, 0), (64, 500000.0, 4, 3), (2, 100, 1, 1)])
def test_values_and_gradients_against_numpy(dim: int, base: float, ratio: int, offset: int) -> None:
    rope, x, grad = NTKAwareRoPE(dim, MAX, base, ratio), numbers(5, dim).requires_grad_(), numbers(5, dim).flip(1)
    y = rope(x, offset)
    y.backward(grad)
    stretched = base * ratio ** (dim / (dim - 2)) if ratio > 1 else base
    angles = np.outer(offset + np.arange(5), stretched ** -(np.arange(0, dim, 2) / dim))[:, None]

    def turn(values: Tensor, angle: Any) -> Tensor:
        first, second = np.split(values.detach().double().numpy(), 2, -1)
        cos, sin = np.cos(angle), np.sin(angle)
        return torch.from_numpy(np.concatenate([first * cos - second * sin, second * cos + first * sin], -1))

    torch.testing.assert_close(y.detach().double(), turn(x, angles), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), turn(grad, -angles), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [1, 2, 8])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_of_the_formula(ratio: int, offset: int, dtype: torch.dtype) -> None:
    x = numbers(5, dtype=dtype)
    before, y = x.clone(), NTKAwareRoPE(DIM, MAX, ratio=ratio)(x, offset)
    assert y.dtype == dtype
    assert torch.equal(y, rotated(x, ratio, offset))
    assert torch.equal(x, before)


GROWTH = [(1, 8, 1), (1, 9, 2), (1, 16, 2), (1, 17, 4), (1, 32, 4), (1, 33, 6), (2, 16, 2), (2, 17, 4), (3, 24, 3)]
GROWTH += [(3, 25, 4), (4, 32, 4), (4, 33, 6), (1.5, 12, 1.5), (1.5, 13, 2)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("offset", [0, 7])
@pytest.mark.parametrize("ratio, length, grown", GROWTH)
def test_growth_by_the_smallest_even_ratio(ratio: float, length: int, grown: float, offset: int, dynamic: bool) -> None:
    rope, x = NTKAwareRoPE(DIM, MAX, 10000, ratio, dynamic), numbers(length - offset)
    assert torch.equal(rope(x, offset), rotated(x, grown, offset))
    kept = grown if dynamic else ratio
    assert rope.ratio == kept
    short = numbers(3)
    assert torch.equal(rope(short), rotated(short, kept))


def test_dynamic_growth_never_shrinks() -> None:
    rope = NTKAwareRoPE(DIM, MAX, dynamic=True)
    for length, ratio in [(9, 2), (40, 6), (17, 6), (48, 6), (49, 8)]:
        x = numbers(length)
        assert torch.equal(rope(x), rotated(x, ratio)) and rope.ratio == ratio


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_table_dtype(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    rope = NTKAwareRoPE(DIM, MAX, dynamic=True, dtype=dtype)
    for length, ratio in ((8, 1), (16, 2)):
        x = numbers(length, dtype=torch.bfloat16)
        assert rope(x).dtype == torch.bfloat16
        for table, want in zip((rope.cos, rope.sin), formula(length, ratio, wide), strict=True):
            assert table.dtype == dtype and torch.equal(table, want.to(dtype))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casts_leave_the_tables_alone(cast: Callable[[nn.Module], nn.Module]) -> None:
    rope, freqs = NTKAwareRoPE(DIM, MAX, dynamic=True), frequencies(10000.0)
    cast(nn.ModuleList([rope, freqs]))
    x = numbers(MAX)
    assert (rope.cos.dtype, rope.sin.dtype) == (torch.float32, torch.float32)
    assert torch.equal(rope(x), rotated(x))
    assert torch.equal(freqs.inverse, frequencies(10000.0).inverse)
    rope(numbers(2 * MAX))
    assert rope.cos.dtype == torch.float32


def test_tables_are_not_saved() -> None:
    rope, freqs = NTKAwareRoPE(DIM, MAX), frequencies(10000.0)
    assert not rope.state_dict() and not freqs.state_dict()
    assert not list(rope.parameters()) and not list(freqs.parameters())
    assert {name for name, _ in rope.named_buffers()} == {"cos", "sin"}
    NTKAwareRoPE(DIM, 2 * MAX).load_state_dict(rope.state_dict())


@pytest.mark.parametrize("dynamic", [False, True])
def test_growth_in_inference_mode_does_not_poison_training(dynamic: bool) -> None:
    with torch.inference_mode():
        rope = NTKAwareRoPE(DIM, MAX, dynamic=dynamic)
        rope(numbers(20))
    assert rope.ratio == (4 if dynamic else 1)
    x = numbers(5).requires_grad_()
    rope(x).backward(numbers(5))
    assert torch.equal(rope(x), rotated(x, rope.ratio))
    assert x.grad.isfinite().all() and not rope.cos.is_inference()


@pytest.mark.parametrize("leave", ["to", "born"])
@pytest.mark.parametrize("recurse", ["alone", "in a model"])
def test_meta_and_back(leave: str, recurse: str) -> None:
    rope, want = (
        NTKAwareRoPE(DIM, MAX, ratio=2, device="meta" if leave == "born" else "cpu"),
        NTKAwareRoPE(DIM, MAX, ratio=2),
    )
    root = rope if recurse == "alone" else nn.Sequential(nn.Linear(2, 2), rope)
    root.to("meta")
    assert rope.cos.is_meta and rope.sin.is_meta
    root.to_empty(device="cpu")
    assert torch.equal(rope.cos, want.cos) and torch.equal(rope.sin, want.sin)


def test_grown_tables_follow_the_device() -> None:
    rope = NTKAwareRoPE(DIM, MAX, dynamic=True)
    rope(numbers(9))
    rope.to("meta")
    assert rope(numbers(20).to("meta")).is_meta
    assert rope.ratio == 4 and rope.cos.is_meta and rope.cos.shape == (4 * MAX, DIM)
    rope.to_empty(device="cpu")
    assert torch.equal(rope(numbers(20)), rotated(numbers(20), 4))


def test_deepcopy_grows_alone() -> None:
    rope = NTKAwareRoPE(DIM, MAX, dynamic=True)
    twin = copy.deepcopy(rope)
    twin(numbers(9))
    assert (rope.ratio, twin.ratio) == (1, 2) and rope.cos.shape[0] == MAX


def frequencies(theta: float, **options: Any) -> RotaryFrequencies:
    return RotaryFrequencies(ModelArgs(dim=DIM, n_heads=1, rope_theta=theta), **options)


def test_rotary_frequencies() -> None:
    freqs = frequencies(500.0)
    angles = np.outer(np.arange(12), 500.0 ** -(np.arange(0, DIM, 2) / DIM))
    want = torch.from_numpy(np.exp(1j * angles))
    assert freqs(0, 12).dtype == torch.complex64
    for start, length in ((0, 12), (0, 5), (4, 3)):
        got = freqs(start, length).to(torch.complex128)
        torch.testing.assert_close(got, want[start : start + length], rtol=1e-5, atol=1e-5)


def test_positions_count_from_the_first_real_token() -> None:
    freqs = frequencies(500.0)
    rows = freqs(3, 4, torch.tensor([0, 2, 5]))
    assert torch.equal(rows[0], freqs(3, 4)) and torch.equal(rows[1], freqs(1, 4))
    assert torch.equal(rows[2, 2:], freqs(0, 2)) and torch.equal(rows[2, :2], freqs(0, 1).expand(2, -1))


def test_rotary_frequencies_on_meta_and_back() -> None:
    freqs, want = frequencies(500.0, device="meta"), frequencies(500.0).inverse
    assert freqs.inverse.is_meta
    assert torch.equal(freqs.to_empty(device="cpu").inverse, want)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: NTKAwareRoPE(7, MAX), "dim=7 must be even"),
        (lambda: NTKAwareRoPE(7, MAX, ratio=2), "dim=7 must be even"),
        (lambda: NTKAwareRoPE(0, MAX), "dim=0 must be even and at least 2"),
        (lambda: NTKAwareRoPE(2, MAX, ratio=2), "dim=2 .* ratio=2; use dim >= 4"),
        (lambda: NTKAwareRoPE(2, MAX)(numbers(9, 2)), "dim=2 .* ratio=2; use dim >= 4"),
        (lambda: NTKAwareRoPE(DIM, 0), "max_seq_len=0 and ratio=1 must both be at least 1"),
        (lambda: NTKAwareRoPE(DIM, MAX, ratio=0.5), "max_seq_len=8 and ratio=0.5 must both be at least 1"),
        (lambda: NTKAwareRoPE(DIM, MAX)(numbers(3), -1), "offset=-1 must not be negative"),
        (lambda: NTKAwareRoPE(DIM, MAX)(numbers(3, 6)), r"hd=8\], got shape \[2, 3, 3, 6\]"),
        (lambda: NTKAwareRoPE(DIM, MAX)(numbers(3)[0]), r"\[b, s, nh, hd=8\], got shape \[3, 3, 8\]"),
        (lambda: rope_frequencies(7, 10000.0), "head_dim=7 must be even"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
