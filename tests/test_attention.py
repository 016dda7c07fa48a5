"""Attention against Llama 3's, written out in float64: values, gradients, KV cache, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import Group
from src.modeling import Attention, ModelArgs
from src.modeling.attention import Mask
from src.testing import RankFailed, Ranks

from .test_linear import whole

LENGTH = 12
ARGS = ModelArgs(dim=32, n_heads=8, n_kv_heads=4, max_batch_size=3, max_seq_len=LENGTH)
Weights = dict[str, Tensor]


def freqs(start: int = 0, length: int = LENGTH) -> Tensor:
    """Rotations of positions ``[start, start + length)``: complex ``[length, head_dim / 2]``."""
    angles = torch.outer(torch.arange(start, start + length).double(), torch.tensor([1.0, 0.3]).double())
    return torch.polar(torch.ones_like(angles), angles)


def causal(start: int = 0, length: int = LENGTH, dtype: torch.dtype = torch.float64) -> Tensor:
    late = torch.arange(start + length) > torch.arange(start, start + length)[:, None]
    return torch.zeros(late.shape, dtype=dtype).masked_fill(late, -math.inf)


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Neighbouring channels of ``x [b, s, nh, hd]`` as a complex number, times ``freqs_cis [s, hd / 2]``."""
    cos, sin, re, im = freqs_cis.real[:, None], freqs_cis.imag[:, None], x[..., ::2], x[..., 1::2]
    return torch.stack([re * cos - im * sin, re * sin + im * cos], -1).flatten(-2)


def reference_attention(
    weights: Weights, x: Tensor, freqs_cis: Tensor, mask: Tensor | None, args: ModelArgs, prefix: str = ""
) -> Tensor:
    q, k, v = (F.linear(x, weights[f"{prefix}w{name}.weight"]).unflatten(-1, (-1, args.head_dim)) for name in "qkv")
    q, k = rotate(q, freqs_cis), rotate(k, freqs_cis)
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(args.head_dim)
    scores = scores if mask is None else scores + mask
    return F.linear(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2), weights[f"{prefix}wo.weight"])


def inputs(width: int = 32, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, batch, LENGTH, width, dtype=torch.float64, generator=generator)
    return x, grad


def state(module: nn.Module) -> tuple[Weights, dict[str, int]]:
    """Weights and gradients by name, and the sharded dims of both."""
    out = {name: parameter.detach() for name, parameter in module.named_parameters()}
    out |= {f"{name}.grad": parameter.grad for name, parameter in module.named_parameters()}
    parts = [(path, part) for path, part in module.named_modules() if hasattr(part, "shard_dims")]
    dims = {f"{path}.{name}": dim for path, part in parts for name, dim in part.shard_dims().items()}
    return out, dims | {f"{name}.grad": dim for name, dim in dims.items()}


def traced(module: nn.Module, *args: Any) -> tuple[Weights, dict[str, int]]:
    """One forward and backward of ``module(x, *args)``: its ``state``, with the output and the gradient of x."""
    x, grad = inputs()
    y = module(x.requires_grad_(), *args)
    y.backward(grad)
    out, dims = state(module)
    return out | {"y": y.detach(), "x.grad": x.grad}, dims


def check_against(reference: Callable[[Weights, Tensor], Tensor], results: list[tuple[Weights, Any]]) -> None:
    """Compare what ``traced`` gave on each rank with ``reference(weights, x)`` and its gradients."""
    got = whole([out for out, _ in results], results[0][1])
    weights = {name: got[name].clone().requires_grad_() for name in got if f"{name}.grad" in got}
    x, grad = inputs()
    y = reference(weights, x.requires_grad_())
    y.backward(grad)
    want = {"y": y, "x.grad": x.grad} | {f"{name}.grad": weight.grad for name, weight in weights.items()}
    assert want.keys() | weights.keys() == got.keys()
    torch.testing.assert_close({name: got[name] for name in want}, want, rtol=1e-9, atol=1e-11)


def attention(group: Group | None = None, args: ModelArgs = ARGS) -> Attention:
    return Attention(args, group=group, dtype=torch.float64)


def forward_backward(group: Group, args: ModelArgs, mask: Mask) -> Any:
    return traced(attention(group, args), 0, freqs(), mask)


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 4])
@pytest.mark.parametrize("kv_heads", [None, 4])
@pytest.mark.parametrize("mask", [None, causal(), "causal"], ids=["full", "mask", "causal"])
def test_values_and_gradients(ranks: Ranks, num_shards: int | None, kv_heads: int | None, mask: Mask) -> None:
    args = ModelArgs(dim=32, n_heads=8, n_kv_heads=kv_heads)
    results = ranks(forward_backward, args, mask, num_shards=num_shards)
    expected = causal() if isinstance(mask, str) else mask
    check_against(lambda weights, x: reference_attention(weights, x, freqs(), expected, args), results)


def steps(module: Attention, x: Tensor, lengths: list[int]) -> Tensor:
    """``x`` through the cache, run by run."""
    out, start = [], 0
    for length in lengths:
        mask = None if length == 1 else causal(start, length)
        out.append(module(x[:, start : start + length], start, freqs(start, length), mask).detach())
        start += length
    return torch.cat(out, 1)


def decode(group: Group, lengths: list[int]) -> Any:
    module, (x, _) = attention(group), inputs()
    full = module(x, 0, freqs(), causal()).detach()
    assert module.cache_k is None and module.cache_v is None
    with torch.no_grad():
        first, again = steps(module, x.flip(1), lengths), steps(module, x, lengths)
    assert module.cache_k is not None and module.cache_v is not None
    return full, again, first, sorted(module.state_dict()), module.cache_k.shape


@pytest.mark.ranks(1, 2, 4, gloo=2)
@pytest.mark.parametrize("num_shards", [None, 4])
@pytest.mark.parametrize("lengths", [[1] * LENGTH, [5, 1, 1, 4, 1], [LENGTH]], ids=["tokens", "runs", "whole"])
def test_cache_gives_what_the_full_forward_gives(ranks: Ranks, num_shards: int | None, lengths: list[int]) -> None:
    for full, cached, other, names, shape in ranks(decode, lengths, num_shards=num_shards):
        torch.testing.assert_close(cached, full, rtol=1e-11, atol=1e-12)
        assert not torch.allclose(other, full)
        assert names == ["wk.weight", "wo.weight", "wq.weight", "wv.weight"]
        assert shape == (3, LENGTH, 4 // ranks.world_size, 4)


def continued(group: Group) -> Any:
    """The last 5 positions alone, with gradients, on top of a cache of the first 7; and as a part of the whole."""
    module, (x, grad) = attention(group), inputs()
    with torch.no_grad():
        steps(module, x[:, :7], [7])
    tail, everything = x[:, 7:].clone().requires_grad_(), x.clone().requires_grad_()
    y = module(tail, 7, freqs(7, 5), causal(7, 5))
    y.backward(grad[:, 7:])
    full = module(everything, 0, freqs(), causal())[:, 7:]
    full.backward(grad[:, 7:])
    return (y.detach(), tail.grad), (full.detach(), everything.grad[:, 7:])


@pytest.mark.ranks(1, 2, 4, gloo=())
def test_gradients_of_fresh_positions_on_top_of_a_cache(ranks: Ranks) -> None:
    for got, want in ranks(continued):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_leaves_the_cache_alone(mode: Any) -> None:
    module, (x, _) = attention(), inputs()
    with mode():
        prefix = steps(module, x[:, :7], [7])
    before = module.cache_k.clone(), module.cache_v.clone()
    assert before[0].any() and before[1].any()
    many = inputs(batch=5)[0].requires_grad_()
    module(many, 0, freqs(), causal()).sum().backward()
    assert torch.equal(module.cache_k, before[0]) and torch.equal(module.cache_v, before[1])
    with torch.no_grad():
        rest = module(x[:, 7:], 7, freqs(7, 5), causal(7, 5))
    torch.testing.assert_close(torch.cat([prefix, rest], 1), module(x, 0, freqs(), causal()).detach())


def test_inference_mode_then_no_grad_then_training() -> None:
    module, fresh, (x, grad) = attention(), attention(), inputs()
    with torch.inference_mode():
        inferred = steps(module, x, [6, 6])
    with torch.no_grad():
        decoded = steps(module, x, [6, 6])
    assert torch.equal(inferred, decoded)
    for model in (module, fresh):
        model(x, 0, freqs(), causal()).backward(grad)
    for ours, want in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours.grad, want.grad)


def test_the_cache_follows_the_dtype() -> None:
    module, (x, _) = attention(), inputs()
    with torch.no_grad():
        module(x, 0, freqs(), causal())
        module.to(torch.bfloat16)
        module(x.bfloat16(), 0, freqs(), causal(dtype=torch.bfloat16))
        assert module.cache_k.dtype == module.cache_v.dtype == torch.bfloat16


def test_mask_none_lets_every_query_see_every_position() -> None:
    module, (x, _) = attention(), inputs()
    open_mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
    full, masked = module(x, 0, freqs(), None), module(x, 0, freqs(), causal())
    torch.testing.assert_close(full, module(x, 0, freqs(), open_mask))
    torch.testing.assert_close(full[:, -1], masked[:, -1])
    assert not torch.allclose(full[:, :-1], masked[:, :-1])


def test_errors_of_the_cache() -> None:
    module, (x, _) = attention(), inputs()
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"start_pos=4 .* the KV cache holds 0 positions of 0 sequences"):
            module(x[:, :2], 4, freqs(4, 2))
        module(x[:1, :5], 0, freqs(0, 5))
        with pytest.raises(ValueError, match=r"start_pos=6 .* the KV cache holds 5 positions of 1 sequences"):
            module(x[:1, :2], 6, freqs(6, 2))
        with pytest.raises(ValueError, match=r"batch size 2, but the KV cache holds 5 positions of 1 sequences"):
            module(x[:, :2], 5, freqs(5, 2))
        module(x, 0, freqs(), causal())
        with pytest.raises(ValueError, match=r"start_pos=11 \+ 2 positions exceed max_seq_len=12"):
            module(x[:, :2], 11, freqs(11, 2))
        with pytest.raises(ValueError, match=r"start_pos=0 \+ 13 positions .* max_seq_len=12"):
            module(F.pad(x, (0, 0, 0, 1)), 0, freqs(0, 13))
        with pytest.raises(ValueError, match=r"batch size 4 exceeds max_batch_size=3"):
            module(inputs(batch=4)[0], 0, freqs())


def test_errors_of_the_inputs() -> None:
    module, (x, _) = attention(), inputs()
    with pytest.raises(TypeError, match=r"mask must be additive and of x's dtype torch.float64, not torch.bool"):
        module(x, 0, freqs(), causal() == 0)
    with pytest.raises(TypeError, match=r"not torch.float32"):
        module(x, 0, freqs(), causal().float())
    with pytest.raises(ValueError, match=r"mask must be \[s, start_pos \+ s\] = \[2, 5\], got \[2, 2\]"):
        module(x[:, :2], 3, freqs(3, 2), causal(0, 2))
    with pytest.raises(ValueError, match=r"""mask='masked' is neither a tensor nor "causal\""""):
        module(x, 0, freqs(), "masked")
    with pytest.raises(ValueError, match=r'mask="causal" is for start_pos=0, not 3: pass functional.causal_mask'):
        module(x[:, :2], 3, freqs(3, 2), "causal")
    with pytest.raises(ValueError, match=r"start_pos=-1 must not be negative"):
        module(x, -1, freqs())
    with pytest.raises(ValueError, match=r"Attention expects \[b, s, 32\], got a tensor of shape \[12, 32\]"):
        module(x[0], 0, freqs())
    with pytest.raises(ValueError, match=r"Attention expects a last dim of 32, got a tensor of shape \[2, 12, 31\]"):
        module(x[..., :31], 0, freqs())
    with pytest.raises(ValueError, match=r"freqs_cis must be \[s, hd / 2\] = \[12, 2\].* got \[11, 2\]"):
        module(x, 0, freqs(0, 11))


def build(group: Group, args: ModelArgs) -> None:
    Attention(args, group=group)


def test_heads_that_do_not_divide(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match=r"n_heads=6 cannot be sharded over num_shards=4 logical shards"):
        Attention(ModelArgs(dim=24, n_heads=6), group=Group.single(4))
    with pytest.raises(RankFailed, match=r"n_kv_heads=3 must divide num_shards=4 or be a multiple of it"):
        ranks.on("simulated", 4)(build, ModelArgs(dim=48, n_heads=12, n_kv_heads=3))
