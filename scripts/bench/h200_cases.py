"""The kernels that scripts.bench.h200 measures: what each computes, the work that it cannot avoid, its peers.

Bytes count each tensor read or written once, in bfloat16: n tokens, h channels, V columns of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src import Group, Ledger, simulate
from src import functional as fn
from src.modeling import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

from . import h200_peers as peers
from .h200_case import Beside, Call, Case, Mode, Size

EPS = 1e-5
PER_TOKEN = 256  # bytes of statistics, losses and gradients of losses, in float32
Bars = dict[str, float]


def body_norm(x: Tensor, weight: Tensor, size: int | None = None) -> Tensor:
    """The formula in float32 or wider."""
    groups = x.to(fn.wide(x.dtype)).unflatten(-1, (-1, size or x.shape[-1]))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + EPS)
    y: Tensor = (groups * scale).flatten(-2) * weight
    return y.to(x.dtype)


def norm(size: Size, tokens: int, h: int, mode: Mode, share: float | None, bars: Bars) -> Case:
    """4nh bytes forward, 6nh backward: x, dy, dx."""
    n, h = size.tokens(tokens), size.width(h)
    others: dict[str, Any] = {"quack": peers.quack_norm(EPS), "Liger": peers.liger_norm(EPS)}
    others["F.rms_norm"] = lambda: lambda x, w: F.rms_norm(x, (h,), w, EPS)
    work = {"C": {"fwd": 4, "bwd": 6, "fwd+bwd": 10}[mode] * n * h}
    leaves = [size.drawn(n, h), size.drawn(h)]
    case = Case(lambda x, w: fn.rms_norm(x, w, EPS), body_norm, leaves, mode, work, share, others, bars=bars)
    return case.with_compiled(size)


def host(size: Size, bars: Bars) -> Case:
    """Too small to keep a GPU busy: what it costs to call."""
    return replace(norm(size, 128, 4096, "fwd+bwd", None, bars), work={}, beside={}, wall=True)


def add_norm(size: Size, tokens: int, h: int, mode: Mode, share: float | None, bars: Bars) -> Case:
    """8nh bytes each way."""
    n, h = size.tokens(tokens), size.width(h)

    def body(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return body_norm(total, weight), total

    others: dict[str, Any] = {"Liger": peers.liger_add_norm(EPS), "quack": peers.quack_norm(EPS)}
    leaves = [size.drawn(n, h), size.drawn(n, h), size.drawn(h)]
    work = {"C": (16 if mode == "fwd+bwd" else 8) * n * h}
    case = Case(lambda x, r, w: fn.add_rms_norm(x, r, w, EPS), body, leaves, mode, work, share, others, bars=bars)
    return case.with_compiled(size) if "compile" in bars else case


def group_norm(size: Size, tokens: int, group: int, bars: Bars) -> Case:
    """10nh bytes; "full row" is our own norm of all channels."""
    n, h = size.tokens(tokens), size.width(8192)
    group = min(group, h // 2)
    leaves = [size.drawn(n, h), size.drawn(h)]
    full = partial(Beside, lambda x, w: fn.rms_norm(x, w, EPS), leaves, "fwd+bwd")
    case = Case(
        lambda x, w: fn.group_rms_norm(x, w, group, EPS),
        lambda x, w: body_norm(x, w, group),
        leaves,
        "fwd+bwd",
        {"C": 10 * n * h},
        peers={"mamba_ssm": peers.mamba_norm(group, EPS)},
        beside={"full row": full},
        bars=bars,
    )
    return case.with_compiled(size)


def cross_entropy(size: Size, columns: int, mode: Mode, share: float, bars: Bars, over_logits: bool = False) -> Case:
    """2nV bytes forward, 4nV backward, for any gradient per token; one rank's shard, with nobody to talk to.

    With ``over_logits`` backward writes over them.
    """
    n, v = size.tokens(8192), size.width(columns)
    targets = torch.randint(0, v, (n,), device=size.device)

    def ours(x: Tensor) -> Tensor:
        x = Made.apply(x) if over_logits and x.requires_grad else x  # type: ignore[no-untyped-call]
        return vocab_parallel_cross_entropy(x, targets, group=None, reduction="none", inplace_backward=over_logits)

    def body(x: Tensor) -> Tensor:
        return F.cross_entropy(x.to(fn.wide(x.dtype)), targets, reduction="none")

    others: dict[str, Any] = {"Liger": peers.liger_cross_entropy(targets)}
    others |= {"TE": peers.transformer_engine_cross_entropy(targets)}
    others |= {"flash-attn": peers.flash_cross_entropy(targets, over_logits)}
    logits = size.drawn(n, v)
    gradient = 0 if over_logits or mode == "fwd" else logits.nbytes
    case = Case(ours, body, [logits], mode, {"C": (2 if mode == "fwd" else 6) * n * v}, share, others, bars=bars)
    case = replace(case, memory=gradient + PER_TOKEN * n, proofs={"1 collective": one_collective})
    case = replace(case, repeatable=not over_logits)  # of which a second call finds the gradient of the first
    return case.with_compiled(size) if mode == "fwd" else case


class Made(torch.autograd.Function):
    """Logits that live in no leaf, for nothing: what a head would have made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@cache
def one_collective() -> bool:
    """Whether a cross-entropy between two ranks takes one, forward and backward."""

    def count(group: Group) -> int:
        logits = torch.zeros(2, 4, requires_grad=True)
        with Ledger() as ledger:
            vocab_parallel_cross_entropy(logits, torch.tensor([0, 7]), group=group).backward()
        return ledger.count()

    return simulate(count, 2) == [1, 1]


def linear_cross_entropy(
    size: Size, tokens: int, columns: int, share: float | None, bars: Bars, limit_ms: float | None = None
) -> Case:
    """6nhV operations: three products. The logits once, and the gradients of both operands, are what it may hold."""
    n, h, v = size.tokens(tokens), size.width(4096), size.width(columns)
    targets = torch.randint(0, v, (n,), device=size.device)

    def ours(x: Tensor, weight: Tensor, block_tokens: int | None = None) -> Tensor:
        return vocab_parallel_linear_cross_entropy(x, weight, targets, group=None, block_tokens=block_tokens)

    def body(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).to(fn.wide(x.dtype)), targets)

    def apart(x: Tensor, weight: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(F.linear(x, weight), targets, group=None)

    x, weight = size.drawn(n, h), size.drawn(v, h) / h**0.5
    own: dict[str, Call] = {"recomputed in blocks": lambda x, w: ours(x, w, max(n // 4, 1)), "apart": apart}
    own["plain torch"] = body
    return Case(
        ours,
        body,
        [x, weight],
        "fwd+bwd",
        {"G": 6 * n * h * v},
        share,
        {"Liger": peers.liger_linear_cross_entropy(targets)},
        {name: partial(Beside, call, [x, weight], "fwd+bwd") for name, call in own.items()},
        bars,
        limit_ms=limit_ms,
        memory=1.05 * n * v * x.element_size() + x.nbytes + weight.nbytes,
    )


def embedding(size: Size, mode: Mode, share: float, bars: Bars) -> Case:
    """Rank 0 of 8. Forward 2nh (1 + 1/8) + 8n bytes, backward 2nh/8 + 2Vh: each row of the gradient written once."""
    n, h, v = size.tokens(16384), size.width(4096), size.width(128256 // 8)
    ids = torch.randint(0, 8 * v, (n,), device=size.device)

    def body(table: Tensor) -> Tensor:
        owned = ids < v
        return F.embedding(torch.where(owned, ids, 0), table).masked_fill(~owned[:, None], 0)

    others: dict[str, Any] = {"Megatron's operations": peers.megatron_embedding(ids, 0)}
    work = {"C": 2.25 * n * h + 8 * n if mode == "fwd" else n * h / 4 + 2 * v * h}
    leaves = [size.drawn(v, h)]
    return Case(lambda t: fn.shard_embedding(ids, t, 0), body, leaves, mode, work, share, others, bars=bars)


def rotation(size: Size, layout: str, mode: Mode, share: float, bars: Bars) -> Case:
    """32 + 8 heads of 128 channels, read and written, and the tables; beside backward our own forward."""
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

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return fn.rotate_queries_and_keys(q, k, (cos, sin))

    work = {"C": n * (4 * (nq + nk) * hd + 8 * hd)}
    case = Case(ours, body, [q, k], mode, work, share, {"Liger": peers.liger_rope(cos, sin)}, bars=bars)
    if mode == "bwd":
        case = replace(case, beside={"own fwd": partial(Beside, ours, [q, k], "fwd")})
    return case.with_compiled(size)


def swiglu(size: Size, f: int, layout: str, mode: Mode, share: float | None, bars: Bars) -> Case:
    """6nf bytes forward, 10nf backward, of the two halves of each row of one tensor, or of two tensors.

    Gradients are tensors of their own in both, as the modules ask for them. Liger's kernel for one tensor gives one
    gradient: the same bytes.
    """
    n, f = size.tokens(16384), size.width(f)
    both = size.drawn(n, 2 * f)
    gate, up = both.chunk(2, -1)
    if layout == "apart":
        gate, up = gate.contiguous(), up.contiguous()

    def body(gate: Tensor, up: Tensor) -> Tensor:
        wide = fn.wide(gate.dtype)
        return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)

    def packed() -> Beside | None:
        call = peers.liger_packed_swiglu()()
        return None if call is None else Beside(call, [both], mode)

    work = {"C": {"fwd": 6, "bwd": 10, "fwd+bwd": 16}[mode] * n * f}
    case = Case(fn.swiglu, body, [gate, up], mode, work, share, bars=bars)
    if layout == "apart":
        return replace(case, peers={"Liger": peers.liger_swiglu()})
    case = replace(case, beside={"Liger": packed})
    return case.with_compiled(size) if "compile" in bars else case


def under_compile(size: Size, build: Callable[[Size], Case]) -> Case:
    """A kernel's row turned round: the operation in one graph of torch.compile, beside itself with its kernel.

    Traced, an operation is its body, fused by Inductor. That can be as fast where the body is one pass over memory, or
    two; of the cross-entropy, whose body goes block by block, and of the sorted backward of the embedding it is not
    expected.
    """
    case = build(size)
    eager = partial(Beside, case.ours, case.leaves, case.mode)
    plain: dict[str, Any] = {"share": None, "memory": None, "peers": {}, "proofs": {}}
    return replace(case, ours=size.compiled(case.ours), beside={"eager": eager}, bars={"eager": 0.97}, **plain)
