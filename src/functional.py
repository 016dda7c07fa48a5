"""The mathematics of the layers: no parameters, no group, nothing is sent."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import lookup
from .kernels.row_blocks import wide as wide

Rotation: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""``freqs_cis`` for heads whose neighbours are rotated together, ``(cos, sin)`` for heads of two halves."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., in]``, ``weight [out, in]``, ``bias [out]`` -> ``x W^T + b [..., out]``, under autocast too.

    On CPUs without units for bfloat16 such products are taken in float32 and rounded once. Under autocast each use of a
    parameter that learns is cast alone: autocast would cast it once, but a logical shard of it at each use, and add the
    gradients of its uses before or after rounding.
    """
    if kernel := lookup("linear", x, weight, bias):
        y: Tensor = kernel(x, weight, bias)
        return y
    casts = torch.is_grad_enabled() and autocast_dtype(x.device) is not None
    if casts and (dtype := product_dtype(x, weight)) is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return F.linear(x, weight, bias)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """In which products are taken under autocast; None where it is not active."""
    active = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if active else None


def product_dtype(x: Tensor, *weights: Tensor) -> torch.dtype | None:
    """In which ``linear`` multiplies ``x`` by each of ``weights``: autocast's, or their own; None where they differ."""
    dtypes = {x.dtype, *(weight.dtype for weight in weights)}
    cast = autocast_dtype(x.device)
    if cast is not None and torch.float64 not in dtypes:
        return cast
    return x.dtype if len(dtypes) == 1 else None


def linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad [n, out]``, ``weight [out, in]`` -> ``[n, in]``, with the bits that autograd gives ``linear``."""
    kernel = lookup("linear_input_grad", grad, weight)
    x_grad: Tensor = kernel(grad, weight) if kernel else grad.mm(weight)
    return x_grad


def linear_weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """``grad [n, out]``, ``x [n, in]`` -> ``[out, in]``, with the bits that autograd gives ``linear``."""
    kernel = lookup("linear_weight_grad", grad, x)
    weight_grad: Tensor = kernel(grad, x) if kernel else grad.t().mm(x)
    return weight_grad


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x [..., h]``, ``weight [h]`` -> ``x / sqrt(mean(x^2) + eps) * weight``, of x's dtype and device."""
    return group_rms_norm(x, weight, x.size(-1), eps)


def group_rms_norm(x: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """RMS norm of each run of ``group_size`` channels of ``x [..., h]``, scaled by ``weight [h]``.

    Statistics in float32 or wider, one rounding at the end; the output has x's dtype and device.
    """
    y: Tensor
    if kernel := lookup("group_rms_norm", x, weight, group_size):
        y = kernel(x, weight, group_size, eps)
        return y
    if _in_one_call(x, weight, group_size):
        return torch.rms_norm(x, (group_size,), weight, eps)
    groups = x.to(wide(x.dtype)).unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    y = (groups * scale).flatten(-2) * weight.to(x.device)
    return y.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(total, weight, eps), total)`` with ``total = x + residual``, all ``[..., h]``."""
    return add_group_rms_norm(x, residual, weight, x.size(-1), eps)


def add_group_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, group_size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """``(group_rms_norm(total, weight, group_size, eps), total)`` with ``total = x + residual``, all ``[..., h]``.

    The sum is rounded to its dtype before the norm is taken, with or without a kernel that does both at once.
    """
    if kernel := lookup("add_group_rms_norm", x, weight, group_size, residual):
        normed, total = kernel(x, residual, weight, group_size, eps)
        return normed, total
    total = x + residual
    return group_rms_norm(total, weight, group_size, eps), total


def shard_embedding(ids: Tensor, table: Tensor, first: int) -> Tensor:
    """Rows of ``table [n, e]`` for the ids in ``[first, first + n)``, exact zeros for all others: ``[..., e]``.

    Rows are selected, never multiplied by a mask: an infinite row must not leak as NaN.
    """
    if kernel := lookup("shard_embedding", ids, table):
        found: Tensor = kernel(ids, table, first)
        return found
    local = ids - first
    owned = (local >= 0) & (local < table.shape[0])
    rows = F.embedding(torch.where(owned, local, 0), table)
    return rows.masked_fill(~owned.unsqueeze(-1), 0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer 2020, "GLU Variants Improve Transformer")."""
    if kernel := lookup("swiglu", gate, up):
        y: Tensor = kernel(gate, up)
        return y
    return F.silu(gate) * up


def sinusoidal_pos_emb(
    length: int,
    dim: int,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Tensor:
    """The additive encoding of Vaswani et al. 2017: ``[length, dim]``.

        PE[pos, 2i] = sin(pos / base^(2i / dim)),   PE[pos, 2i + 1] = cos(pos / base^(2i / dim))

    Raises ValueError for an odd ``dim``.
    """
    angles = _angles(length, dim, base, wide(dtype), device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).to(dtype)


def rope_tables(
    length: int,
    dim: int,
    base: float,
    ratio: float = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """cos and sin ``[length, dim]`` of rotary embeddings (Su et al. 2021), stretched ``ratio`` times by the NTK rule.

    The NTK rule replaces ``base`` by ``base * ratio^(dim / (dim - 2))``: the lowest frequency is interpolated by
    ``ratio``, the highest is kept. Columns ``i`` and ``i + dim/2`` hold the same angle.

    Raises ValueError for an odd ``dim``, and for ``dim=2`` with ``ratio > 1``.
    """
    if ratio != 1:
        if dim == 2:
            raise ValueError(f"dim=2 has one frequency only and cannot be stretched by ratio={ratio}; use dim >= 4")
        base = base * ratio ** (dim / (dim - 2))
    angles = _angles(length, dim, base, wide(dtype), device)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    """``(x1, x2) -> (-x2, x1)`` over the two halves of the last dim."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def apply_rotary_pos_emb(input: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs ``(i, i + hd/2)`` of ``input [b, s, nh, hd]`` by the angles of ``cos, sin [s, hd]``.

    Tables ``[b, s, hd]`` serve rows at different positions. Computed in the tables' dtype (or the input's where that is
    wider); the output has input's dtype and device.

    Raises ValueError for an odd hd and when the tables do not fit the input.
    """
    if input.shape[-1] % 2:
        raise ValueError(f"hd={input.shape[-1]} must be even: channels are rotated in pairs")
    if cos.shape != sin.shape or not _fits(cos, input, input.shape[-1]):
        raise ValueError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)} must both be [s, hd] = "
            f"[{input.shape[1]}, {input.shape[-1]}] for input [b, s, nh, hd] = {list(input.shape)}"
        )
    turned: Tensor
    if kernel := lookup("rotate", (input,), (cos, sin)):
        turned = kernel((input,), (cos, sin))[0]
        return turned
    cos, sin = (table.to(input.device).unsqueeze(-2) for table in (cos, sin))
    x = input.to(torch.promote_types(input.dtype, cos.dtype))
    turned = _rotated_in_one_pass(x, cos, sin) if torch.compiler.is_compiling() else x * cos + rotate_half(x) * sin
    return turned.to(input.dtype)


def precompute_freqs_cis(head_dim: int, length: int, theta: float = 500000.0) -> Tensor:
    """``exp(i * position * theta^(-2j / head_dim))`` as complex64 ``[length, head_dim / 2]``, as in Llama 3."""
    angles = _angles(length, head_dim, theta, torch.float32, "cpu")
    return torch.polar(torch.ones_like(angles), angles)


def rotate_neighbours(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate channel pairs ``(2j, 2j + 1)`` of ``x [b, s, nh, hd]`` by ``freqs_cis [s, hd / 2]`` or ``[b, s, hd / 2]``.

    Llama 3's pairing, which differs from that of ``apply_rotary_pos_emb`` by ``neighbours_to_halves``. Computed in
    float32 or wider; the output has x's dtype and device.

    Raises ValueError when the frequencies do not fit, TypeError when they are not complex.
    """
    if not freqs_cis.is_complex():
        raise TypeError(f"freqs_cis must be complex, as precompute_freqs_cis gives it, not {freqs_cis.dtype}")
    if not _fits(freqs_cis, x, x.shape[-1] // 2):
        raise ValueError(
            f"freqs_cis must be [s, hd / 2] = [{x.shape[1]}, {x.shape[-1] // 2}] for x {list(x.shape)}, "
            f"got {list(freqs_cis.shape)}"
        )
    if kernel := lookup("rotate", (x,), (freqs_cis,)):
        turned: Tensor = kernel((x,), (freqs_cis,))[0]
        return turned
    pairs = torch.view_as_complex(x.to(wide(x.dtype)).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs_cis.to(x.device).unsqueeze(-2)).flatten(-2).to(x.dtype)


def rotate_heads(x: Tensor, rotation: Rotation) -> Tensor:
    """``x [b, s, nh, hd]`` rotated by ``freqs_cis`` (neighbours) or by ``(cos, sin)`` (halves)."""
    return apply_rotary_pos_emb(x, *rotation) if isinstance(rotation, tuple) else rotate_neighbours(x, rotation)


def rotate_queries_and_keys(q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """``rotate_heads`` of ``q [b, s, nq, hd]`` and ``k [b, s, nk, hd]``, in one launch where a kernel serves them."""
    tables = rotation if isinstance(rotation, tuple) else (rotation,)
    if kernel := lookup("rotate", (q, k), tables):
        q, k = kernel((q, k), tables)
        return q, k
    return rotate_heads(q, rotation), rotate_heads(k, rotation)


def neighbours_to_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a query or key projection ``[nh * hd, in]`` from Llama's pairing to that of halves.

    Raises ValueError when ``num_heads`` heads of an even size are not what the rows make.
    """
    return weight.view(num_heads, _pairs(weight, num_heads), 2, -1).transpose(1, 2).reshape(weight.shape)


def halves_to_neighbours(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of ``neighbours_to_halves``."""
    return weight.view(num_heads, 2, _pairs(weight, num_heads), -1).transpose(1, 2).reshape(weight.shape)


def causal_mask(
    length: int,
    start_pos: int = 0,
    *,
    padding: Tensor | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Additive mask ``[length, start_pos + length]``: 0 where a query may look, -inf at later positions.

    With ``padding [b]``, the number of fillers at the start of each row, the mask is ``[b, 1, length, start_pos +
    length]`` and hides them from all tokens; a filler sees itself, so that its own row is no NaN.
    """
    mask = torch.full((length, start_pos + length), -math.inf, dtype=dtype, device=device).triu(start_pos + 1)
    if padding is None:
        return mask
    keys = torch.arange(start_pos + length, device=device)
    fillers = keys < padding.to(device).view(-1, 1, 1, 1)
    own = keys == keys[start_pos:].unsqueeze(1)
    return mask.masked_fill(fillers & ~own, -math.inf)


def _in_one_call(x: Tensor, weight: Tensor, group_size: int) -> bool:
    """Whether torch's norm has the bits of ours; its gradient has two terms, which others of ``x`` may come between."""
    if torch.is_grad_enabled() or weight.numel() != group_size or x.dtype != weight.dtype:
        return False
    return x.is_cpu and weight.is_cpu


def _rotated_in_one_pass(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + rotate_half(x) * sin``, with its bits, as torch.compile fuses it best."""
    (x1, x2), (cos1, cos2), (sin1, sin2) = (tensor.chunk(2, -1) for tensor in (x, cos, sin))
    return torch.cat([x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2], -1)


def _fits(table: Tensor, x: Tensor, width: int) -> bool:
    """Whether a table of rotations has one row of ``width`` for each position of ``x [b, s, nh, hd]``."""
    return table.shape == (x.shape[1], width) or table.shape == (x.shape[0], x.shape[1], width)


def _pairs(weight: Tensor, num_heads: int) -> int:
    """Rotated pairs of one head."""
    if weight.shape[0] % (2 * num_heads):
        raise ValueError(f"{weight.shape[0]} rows are not num_heads={num_heads} heads of an even size")
    return weight.shape[0] // (2 * num_heads)


def _angles(length: int, dim: int, base: float, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """``position * base^(-2j / dim)``: ``[length, dim / 2]``."""
    if dim < 2 or dim % 2:
        raise ValueError(f"dim={dim} must be even and at least 2: channels are rotated in pairs")
    inverse = 1.0 / (base ** (torch.arange(0, dim, 2, device=device).to(dtype) / dim))
    return torch.outer(torch.arange(length, device=device).to(dtype), inverse)
