"""The rows of scripts.bench.h200: what each computes, the work that it cannot avoid, its bars.

Bytes count each tensor read or written once, in bfloat16: n tokens, h channels, V columns of logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import src.modeling as modeling
from src import functional as fn
from src.modeling import ModelArgs, TransformerBlock, vocab_parallel_cross_entropy

from . import h200_peers as peers
from .h200_case import Call, Case, Mode, Row, Size

EPS = 1e-5


def body_norm(x: Tensor, weight: Tensor, size: int | None = None) -> Tensor:
    """The formula in float32 or wider."""
    groups = x.to(fn.wide(x.dtype)).unflatten(-1, (-1, size or x.shape[-1]))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + EPS)
    y: Tensor = (groups * scale).flatten(-2) * weight
    return y.to(x.dtype)


def norm(size: Size, h: int, mode: Mode, share: float, bars: dict[str, float]) -> Case:
    """6nh bytes backward: x, dy, dx."""
    n, h = size.tokens(65536), size.width(h)
    native = lambda x, w: F.rms_norm(x, (h,), w, EPS)  # noqa: E731
    others: dict[str, Any] = {"quack": peers.quack_norm(EPS), "Liger": peers.liger_norm(EPS)}
    others |= {"compile": peers.compiled(body_norm), "F.rms_norm": lambda: native}
    work = {"C": (4 if mode == "fwd" else 6) * n * h}
    ours = lambda x, w: fn.rms_norm(x, w, EPS)  # noqa: E731
    return Case(ours, body_norm, [size.drawn(n, h), size.drawn(h)], mode, work, share, others, bars)


def add_norm(size: Size, h: int, mode: Mode, share: float | None, bars: dict[str, float]) -> Case:
    """8nh bytes each way."""
    n, h = size.tokens(65536), size.width(h)

    def body(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return body_norm(total, weight), total

    others: dict[str, Any] = {
        "Liger": peers.liger_add_norm(EPS),
        "quack": peers.quack_norm(EPS),
        "compile": peers.compiled(body),
    }
    leaves = [size.drawn(n, h), size.drawn(n, h), size.drawn(h)]
    work = {"C": (16 if mode == "fwd+bwd" else 8) * n * h}
    return Case(lambda x, r, w: fn.add_rms_norm(x, r, w, EPS), body, leaves, mode, work, share, others, bars)


def group_norm(size: Size, group: int, bars: dict[str, float]) -> Case:
    """10nh bytes; "full row" is our own norm of all channels."""
    n, h = size.tokens(65536), size.width(8192)
    group = min(group, h // 2)
    body = lambda x, w: body_norm(x, w, group)  # noqa: E731
    others: dict[str, Any] = {"mamba_ssm": peers.mamba_norm(group, EPS)}
    others["compile"] = peers.compiled(body)
    leaves, work = [size.drawn(n, h), size.drawn(h)], {"C": 10 * n * h}
    ours = lambda x, w: fn.group_rms_norm(x, w, group, EPS)  # noqa: E731
    return Case(ours, body, leaves, "fwd+bwd", work, None, others, bars)


def cross_entropy(size: Size, columns: int, mode: Mode, share: float, bars: dict[str, float]) -> Case:
    """2nV bytes forward, 4nV backward, for any gradient per token; one rank's shard, with nobody to talk to."""
    n, v = size.tokens(8192), size.width(columns)
    targets = torch.randint(0, v, (n,), device=size.device)
    loss: Any = vocab_parallel_cross_entropy
    inplace = "inplace_backward" in inspect.signature(loss).parameters

    def ours(x: Tensor) -> Any:
        return loss(x, targets, group=None, reduction="none")

    def body(x: Tensor) -> Tensor:
        return F.cross_entropy(x.to(fn.wide(x.dtype)), targets, reduction="none")

    def over_logits(x: Tensor) -> Any:
        return loss(x.view_as(x), targets, group=None, reduction="none", inplace_backward=True)

    others: dict[str, Any] = {"Liger": peers.liger_cross_entropy(targets)}
    others |= {"TE": peers.transformer_engine_cross_entropy(targets)}
    others |= {"flash-attn": peers.flash_cross_entropy(targets, False), "compile": peers.compiled(body)}
    others |= {"ours, over its logits": lambda: over_logits if inplace and mode != "fwd" else None}
    work = {"C": (2 if mode == "fwd" else 6) * n * v}
    return Case(ours, body, [size.drawn(n, v)], mode, work, share, others, bars)


def linear_cross_entropy(size: Size, tokens: int, columns: int, share: float | None, bars: dict[str, float]) -> Case:
    """6nhV operations: three products."""
    loss = getattr(modeling, "vocab_parallel_linear_cross_entropy", None)
    if loss is None:
        raise peers.Missing("src.modeling has no vocab_parallel_linear_cross_entropy")
    n, h, v = size.tokens(tokens), size.width(4096), size.width(columns)
    targets = torch.randint(0, v, (n,), device=size.device)

    def body(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).to(fn.wide(x.dtype)), targets)

    def apart(x: Tensor, weight: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(F.linear(x, weight), targets, group=None)

    def recomputed(x: Tensor, weight: Tensor) -> Any:
        return loss(x, weight, targets, group=None, block_tokens=max(n // 4, 1))

    others: dict[str, Any] = {"Liger": peers.liger_linear_cross_entropy(targets)}
    others |= {"apart": lambda: apart, "recomputed in blocks": lambda: recomputed, "plain torch": lambda: body}
    leaves, work = [size.drawn(n, h), size.drawn(v, h) / h**0.5], {"G": 6 * n * h * v}
    ours = lambda x, weight: loss(x, weight, targets, group=None)  # noqa: E731
    return Case(ours, body, leaves, "fwd+bwd", work, share, others, bars)


def embedding(size: Size, mode: Mode, share: float, bars: dict[str, float]) -> Case:
    """Rank 0 of 8. Forward 2nh (1 + 1/8) + 8n bytes, backward 2nh/8 + 2Vh: each row of the gradient written once."""
    n, h, v = size.tokens(16384), size.width(4096), size.width(128256) // 8
    ids = torch.randint(0, 8 * v, (n,), device=size.device)

    def body(table: Tensor) -> Tensor:
        owned = ids < v
        return F.embedding(torch.where(owned, ids, 0), table).masked_fill(~owned[:, None], 0)

    others: dict[str, Any] = {
        "Megatron's operations": peers.megatron_embedding(ids, 0),
        "compile": peers.compiled(body),
    }
    work = {"C": 2.25 * n * h + 8 * n if mode == "fwd" else n * h / 4 + 2 * v * h}
    return Case(lambda t: fn.shard_embedding(ids, t, 0), body, [size.drawn(v, h)], mode, work, share, others, bars)


def rotation(size: Size, layout: str, mode: Mode, share: float, bars: dict[str, float]) -> Case:
    """32 + 8 heads of 128 channels, read and written, and the tables."""
    n, hd, nq, nk = size.tokens(16384), size.width(128), 32 if not size.dry else 2, 8 if not size.dry else 1
    cos, sin = fn.rope_tables(n, hd, 500000.0, device=size.device)
    packed = size.drawn(1, n, nq + 2 * nk, hd)
    q, k = packed[:, :, :nq], packed[:, :, nq : nq + nk]
    if layout == "b s h d":
        q, k = q.contiguous(), k.contiguous()
    elif layout == "b h s d":
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))

    def body(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        c, s = cos[:, None], sin[:, None]
        wide = fn.wide(q.dtype)
        turned = [(x.to(wide) * c + fn.rotate_half(x.to(wide)) * s).to(x.dtype) for x in (q, k)]
        return turned[0], turned[1]

    theirs = peers.liger_rope()

    def liger() -> Call | None:
        found = theirs()
        return None if found is None else lambda q, k: found(q, k, cos, sin)

    others: dict[str, Any] = {"Liger": liger, "compile": peers.compiled(body)}
    work = {"C": n * (4 * (nq + nk) * hd + 8 * hd)}
    ours = lambda q, k: fn.rotate_queries_and_keys(q, k, (cos, sin))  # noqa: E731
    return Case(ours, body, [q, k], mode, work, share, others, bars)


def swiglu(size: Size, f: int, mode: Mode, share: float | None, bars: dict[str, float]) -> Case:
    """Gate and up as tensors of their own; 6nf bytes forward, 10nf backward."""
    n, f = size.tokens(16384), size.width(f)

    def body(gate: Tensor, up: Tensor) -> Tensor:
        wide = fn.wide(gate.dtype)
        return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)

    others: dict[str, Any] = {"Liger": peers.liger_swiglu(), "compile": peers.compiled(body)}
    work = {"C": {"fwd": 6, "bwd": 10, "fwd+bwd": 16}[mode] * n * f}
    return Case(fn.swiglu, body, [size.drawn(n, f), size.drawn(n, f)], mode, work, share, others, bars)


def host(size: Size) -> Case:
    """Too small to keep a GPU busy: what it costs to call."""
    n, h = size.tokens(128), size.width(4096)
    case = norm(size.checking(), 4096, "fwd+bwd", 0, {})
    bars = {"Liger": 2.0, "F.rms_norm": 0.5}
    return replace(case, leaves=[size.drawn(n, h), size.drawn(h)], work={}, share=None, bars=bars, wall=True)


def block(size: Size, world: int) -> Case:
    """One rank's part of a Llama 3 8B block at tp = ``world``, without its collectives; beside torch.compile."""
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
    names = [name for name, _ in module.named_parameters()]

    def ours(x: Tensor, *weights: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x, 0, freqs))

    weights = [parameter.detach() for parameter in module.parameters()]
    matrices = sum(w.numel() for w in weights if w.dim() == 2)
    # Attention is full here: without a mask, 4 n^2 operations for each channel of the heads forward, 8 backward.
    work = {"G": 6 * n * matrices + 12 * n * n * heads * args.head_dim}
    others: dict[str, Any] = {"compile": peers.compiled(ours)}
    return Case(ours, ours, [x, *weights], "fwd+bwd", work, None, others, {"compile": 1.0})


def rows() -> list[Row]:
    """All rows, the most telling ones first."""
    listed: list[Row] = []

    def row(bar: int, name: str, build: Callable[..., Case], *arguments: Any, parts: tuple[int, ...] = (1, 2)) -> None:
        listed.append(Row(bar, name, lambda size: build(size, *arguments), parts))

    losses = {"Liger": 3.0, "TE": 1.8, "flash-attn": 1.0}
    for columns in (16384, 131072):
        row(7, f"cross-entropy {columns} fwd+bwd", cross_entropy, columns, "fwd+bwd", 0.90, losses)
        row(7, f"cross-entropy {columns} fwd", cross_entropy, columns, "fwd", 0.92, losses | {"compile": 1.8})
    for h, share, wide in ((16384, 0.82, 2.5), (8192, 0.88, 1.2), (4096, 0.88, 1.2)):
        bars = {"Liger": wide, "compile": 1.05, "quack": 0.98}
        row(2, f"norm {h} bwd", norm, h, "bwd", share, bars)
    for group, mamba in ((64, 3.0), (512, 1.5), (128, None), (1024, None)):
        bars = {"compile": 1.5, "mamba_ssm": mamba} if mamba else {"compile": 1.5}
        row(4, f"norm 8192 groups of {group} fwd+bwd", group_norm, group, bars)
    heads = {"Liger": 2.0, "recomputed in blocks": 1.25}
    row(8, "head and loss 16384 fwd+bwd", linear_cross_entropy, 8192, 16384, 0.90, heads)
    row(8, "head and loss 128256 fwd+bwd", linear_cross_entropy, 4096, 128256, None, {"Liger": 2.0})
    row(6, "embedding shard bwd", embedding, "bwd", 0.50, {"Megatron's operations": 3.0})
    row(6, "embedding shard fwd", embedding, "fwd", 0.85, {"Megatron's operations": 2.5})
    for h in (2048, 4096, 8192, 16384):
        bars = {"quack": 1.0, "compile": 1.0, "Liger": 1.03}
        row(1, f"norm {h} fwd", norm, h, "fwd", 0.90 if h == 2048 else 0.94, bars)
    row(3, "add and norm 8192 fwd", add_norm, 8192, "fwd", 0.94, {})
    row(3, "add and norm 8192 bwd", add_norm, 8192, "bwd", 0.88, {})
    row(3, "add and norm 8192 fwd+bwd", add_norm, 8192, "fwd+bwd", None, {"compile": 1.1})
    for layout in ("b s h d", "packed", "b h s d"):
        bars = {"compile": 1.2, "Liger": 2.0}
        row(5, f"rotation {layout} fwd", rotation, layout, "fwd", 0.90, bars)
    row(5, "rotation b s h d bwd", rotation, "b s h d", "bwd", 0.90, {})
    for f in (14336, 3584):
        row(9, f"swiglu {f} fwd", swiglu, f, "fwd", 0.95, {"compile": 1.0})
        row(9, f"swiglu {f} bwd", swiglu, f, "bwd", 0.93, {"compile": 1.0})
        row(9, f"swiglu {f} fwd+bwd", swiglu, f, "fwd+bwd", None, {"Liger": 1.3, "compile": 1.0})
    row(10, "host time, norm 128 x 4096 fwd+bwd", host, parts=(3,))
    for world in (1, 2, 4, 8):
        row(11, f"block of 8B at tp {world} fwd+bwd", block, world, parts=(3,))
    return listed
