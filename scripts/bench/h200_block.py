"""One rank's part of a transformer block, ours and one written for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src import functional as fn
from src.modeling import ModelArgs, TransformerBlock

from .h200_case import Beside, Case, Size

WEIGHTS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "attention_norm", "ffn_norm")


def block(size: Size, world: int, compiled: bool) -> Case:
    """One rank's part of a Llama 3 8B block at tp = ``world``, without its collectives; causal attention.

    ``compiled``: ours by torch.compile, beside the plain one by torch.compile and ours with its kernels. Attention's
    backward adds up in any order: bits do not come again.
    """
    n, heads = size.tokens(8192), (8 if size.dry else 32) // world
    args = ModelArgs(
        dim=size.width(4096),
        n_heads=heads,
        n_kv_heads=max(heads // 4, 1),
        head_dim=size.width(128),
        ffn_dim=size.width(14336) // world,
    )
    x = size.drawn(1, n, args.dim)
    module = TransformerBlock(0, args, dtype=x.dtype, device=size.device)
    freqs = fn.precompute_freqs_cis(args.head_dim, n).to(size.device)
    named = {name.split(".")[-2]: (name, weight.detach()) for name, weight in module.named_parameters()}
    names, weights = zip(*(named[name] for name in WEIGHTS), strict=True)

    def ours(x: Tensor, *weights: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x, 0, freqs, "causal"))

    body = plain(freqs, args.head_dim, args.norm_eps)
    leaves = [x, *weights]
    matrices = sum(w.numel() for w in weights if w.dim() == 2)
    work = {"G": 6 * n * matrices + 6 * n * n * heads * args.head_dim}
    case = Case(ours, body, leaves, "fwd+bwd", work, repeatable=False, gap_us=3.0 if world == 1 else None)
    if not compiled:
        return case
    others = {"plain": body if size.dry else size.compiled(body), "eager": ours}
    makers = {name: partial(Beside, call, leaves, "fwd+bwd") for name, call in others.items()}
    return replace(case, ours=size.compiled(ours), beside=makers, bars={"plain": 1.0}, gap_us=None)


def plain(freqs: Tensor, head_dim: int, eps: float) -> Callable[..., Tensor]:
    """The block as one would write it for torch.compile."""
    cos, sin = freqs.real.unsqueeze(-2), freqs.imag.unsqueeze(-2)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(fn.wide(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2).to(x.dtype)

    def attend(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w).unflatten(-1, (-1, head_dim)) for w in (wq, wk, wv))
        q, k, v = (heads.transpose(1, 2) for heads in (rotate(q), rotate(k), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return F.linear(y.transpose(1, 2).flatten(-2), wo)

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        wq, wk, wv, wo, w1, w2, w3, attention_norm, ffn_norm = weights
        h = x + attend(norm(x, attention_norm), wq, wk, wv, wo)
        y = norm(h, ffn_norm)
        return h + F.linear(F.silu(F.linear(y, w1)) * F.linear(y, w3), w2)

    return call
