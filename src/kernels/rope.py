"""Rotary embeddings of queries and keys in one launch, for both pairings of channels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import DTYPES, launch, power_of_two, warps

TILE = 2048


def supports(heads: tuple[Tensor, ...], rotation: tuple[Tensor, ...]) -> bool:
    """Whether the kernel serves these: tables that fit and need no gradient."""
    x, table = heads[0], rotation[0]
    width = x.shape[-1] // (2 if table.is_complex() else 1)
    return (
        all(h.dim() == 4 and h.dtype in DTYPES and h.dtype == x.dtype for h in heads)
        and all(h.shape[:2] == x.shape[:2] and h.shape[3] == x.shape[3] for h in heads)
        and all(h.shape[:3].numel() < 2**31 - TILE for h in heads)
        and x.shape[-1] % 2 == 0
        and 0 < x.shape[-1] <= TILE
        and all(t.dtype in ((torch.complex64,) if len(rotation) == 1 else DTYPES) for t in rotation)
        and all(t.dtype == table.dtype and not t.requires_grad for t in rotation)
        and all(t.shape in ((x.shape[1], width), (*x.shape[:2], width)) and t.shape == table.shape for t in rotation)
    )


def rotate(heads: tuple[Tensor, ...], rotation: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One or two tensors ``[b, s, nh, hd]`` rotated by ``(cos, sin)`` (halves) or ``(freqs_cis,)`` (neighbours)."""
    tables = [torch.view_as_real(t.resolve_conj()).flatten(-2) if t.is_complex() else t for t in rotation]
    tables = [table.contiguous() for table in tables]
    rotated: tuple[Tensor, ...] = _Rotate.apply(tables[0], tables[-1], len(tables) == 1, *heads)
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cos: Tensor, sin: Tensor, neighbours: bool, *heads: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.neighbours = neighbours
        return _turn(heads, cos, sin, neighbours, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, None, None, *_turn(grads, cos, sin, ctx.neighbours, back=True)


def _turn(heads: tuple[Tensor, ...], cos: Tensor, sin: Tensor, neighbours: bool, back: bool) -> tuple[Tensor, ...]:
    heads = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in heads)
    turned = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in heads)
    q, k = heads[0], heads[-1]
    tokens, length, dim = q.shape[0] * q.shape[1], q.shape[1], q.shape[3]
    block = power_of_two(dim)
    tile = TILE // block
    blocks = [triton.cdiv(tokens * x.shape[2], tile) for x in heads]
    launch(
        _rotate,
        (sum(blocks),),
        *(q, turned[0], *q.stride()[:3], q.shape[2]),
        *(k, turned[-1], *k.stride()[:3], k.shape[2]),
        *(cos, sin, length * dim if cos.dim() == 3 else 0, tokens, length, blocks[0]),
        **{"DIM": dim, "BLOCK": block, "TILE": tile, "NEIGHBOURS": neighbours, "BACK": back},
        num_warps=warps(TILE),
    )
    return turned


@triton.jit
def _rotate(
    q,
    q_out,
    q_batch,
    q_token,
    q_head,
    q_heads,
    k,
    k_out,
    k_batch,
    k_token,
    k_head,
    k_heads,
    cos,
    sin,
    table_batch,
    tokens,
    length,
    q_blocks,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BACK: tl.constexpr,
):
    """The first ``q_blocks`` programs serve q, the others k: ``TILE`` heads each, of one token or of several."""
    block = tl.program_id(0)
    if block < q_blocks:
        at, to, table, here = _places(q_batch, q_token, q_head, q_heads, table_batch, tokens, length, block, TILE, DIM)
        _rotate_tile(q + at, q_out + to, cos + table, sin + table, here, DIM, BLOCK, NEIGHBOURS, BACK)
    else:
        block -= q_blocks
        at, to, table, here = _places(k_batch, k_token, k_head, k_heads, table_batch, tokens, length, block, TILE, DIM)
        _rotate_tile(k + at, k_out + to, cos + table, sin + table, here, DIM, BLOCK, NEIGHBOURS, BACK)


@triton.jit
def _places(
    batch_stride,
    token_stride,
    head_stride,
    heads,
    table_batch,
    tokens,
    length,
    block,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Where each head of a block begins, where it goes, where its angles are, and whether it exists.

    Heads are counted in 32 bits, in which division is cheap, and addressed in 64.
    """
    row = block * TILE + tl.arange(0, TILE)[:, None]
    token, head = row // heads, (row % heads).to(tl.int64)
    batch, position = (token // length).to(tl.int64), (token % length).to(tl.int64)
    at = batch * batch_stride + position * token_stride + head * head_stride
    return at, row.to(tl.int64) * DIM, batch * table_batch + position * DIM, token < tokens


@triton.jit
def _rotate_tile(
    x,
    y,
    cos,
    sin,
    here,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BACK: tl.constexpr,
):
    """Heads ``[TILE, DIM]`` turned by their angles; ``BACK`` turns the other way: gradients."""
    if NEIGHBOURS:
        lane = tl.arange(0, BLOCK)[None, :]
        mask = here & (lane < DIM)
        x0, x1 = _pairs(x + lane, mask)
        c, s = _pairs(cos + lane, mask)
        s = -s if BACK else s
        turned = tl.reshape(tl.join(x0 * c - x1 * s, x1 * c + x0 * s), mask.shape)
        tl.store(y + lane, turned.to(y.dtype.element_ty), mask)
    else:
        lane = tl.arange(0, BLOCK // 2)[None, :]
        mask = here & (lane < DIM // 2)
        x0 = tl.load(x + lane, mask, 0.0).to(tl.float32)
        x1 = tl.load(x + DIM // 2 + lane, mask, 0.0).to(tl.float32)
        c0 = tl.load(cos + lane, mask, 0.0).to(tl.float32)
        c1 = tl.load(cos + DIM // 2 + lane, mask, 0.0).to(tl.float32)
        s0 = tl.load(sin + lane, mask, 0.0).to(tl.float32)
        s1 = tl.load(sin + DIM // 2 + lane, mask, 0.0).to(tl.float32)
        if BACK:
            s0, s1 = -s1, -s0
        tl.store(y + lane, (x0 * c0 - x1 * s0).to(y.dtype.element_ty), mask)
        tl.store(y + DIM // 2 + lane, (x1 * c1 + x0 * s1).to(y.dtype.element_ty), mask)


@triton.jit
def _pairs(at, mask):
    """Numbers ``[TILE, BLOCK]`` as the two members ``[TILE, BLOCK / 2]`` of pairs of neighbours."""
    values = tl.load(at, mask, 0.0).to(tl.float32)
    return tl.split(tl.reshape(values, [mask.shape[0], mask.shape[1] // 2, 2]))
