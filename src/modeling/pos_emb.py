"""Rotary position embeddings as modules: tables that follow the device, keep their dtype, and grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import Rotation, apply_rotary_pos_emb, rope_tables
from ..rope_scaling import rope_frequencies
from .config import ModelArgs


class _Tables(nn.Module):
    """Non-persistent buffers that follow the module's device and never change their dtype."""

    def reset_tables(self, device: torch.device) -> None:
        """Compute the tables on ``device``."""
        raise NotImplementedError

    def _set(self, name: str, table: Tensor) -> None:
        self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for name, table in self._buffers.items():
            assert table is not None
            device = fn(torch.empty(0, device=table.device)).device
            if table.is_meta and device.type != "meta":
                self.reset_tables(device)
                break
            self._buffers[name] = table.to(device)
        return self


class NTKAwareRoPE(_Tables):
    """Rotary embedding whose range grows by the NTK-aware rule.

    The tables cover ``max_seq_len * ratio`` positions with frequencies of ``base * ratio^(dim / (dim - 2))``. A longer
    input is served with the smallest even ratio that covers it: kept from then on with ``dynamic=True``, used for that
    call alone otherwise. The even ratio is this rule's own; Hugging Face's "dynamic" scaling is another.

    ``dtype`` is that of the tables, computed in float32 or wider. Raises ValueError for an odd ``dim``, for ``dim=2``
    with ``ratio > 1``, and for ``ratio < 1``.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_seq_len: int,
        base: float = 10000,
        ratio: float = 1,
        dynamic: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        if max_seq_len < 1 or ratio < 1:
            raise ValueError(f"max_seq_len={max_seq_len} and ratio={ratio} must both be at least 1")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype} must be floating-point: tables hold cosines and sines")
        self.dim, self.max_seq_len, self.base = dim, max_seq_len, base
        self.ratio, self.dynamic, self.dtype = ratio, dynamic, dtype
        self.reset_tables(torch.device(device))

    def reset_tables(self, device: torch.device) -> None:
        """Compute the tables for the current ``ratio``."""
        cos, sin = self._tables(self.ratio, device)
        self._set("cos", cos)
        self._set("sin", sin)

    def forward(self, input: Tensor, offset: int = 0) -> Tensor:
        """Rotate ``input [b, s, nh, hd]``, whose first position is ``offset``; same shape, dtype and device.

        Raises ValueError for a negative ``offset`` or a last dim other than ``dim``.
        """
        if offset < 0:
            raise ValueError(f"offset={offset} must not be negative")
        if input.dim() != 4 or input.shape[-1] != self.dim:
            raise ValueError(f"input must be [b, s, nh, hd={self.dim}], got shape {list(input.shape)}")
        cos, sin = self._cover(offset + input.shape[1])
        window = slice(offset, offset + input.shape[1])
        return apply_rotary_pos_emb(input, cos[window], sin[window])

    def _cover(self, length: int) -> tuple[Tensor, Tensor]:
        """Tables of at least ``length`` positions."""
        if length <= self.cos.shape[0]:
            return self.cos, self.sin
        ratio = 2 * -(-length // (2 * self.max_seq_len))
        if not self.dynamic:
            return self._tables(ratio, self.cos.device)
        cos, sin = self._tables(ratio, self.cos.device)
        self.ratio = ratio
        self._set("cos", cos)
        self._set("sin", sin)
        return cos, sin

    def _tables(self, ratio: float, device: torch.device) -> tuple[Tensor, Tensor]:
        # Tables born in inference mode could never serve training afterwards.
        with torch.inference_mode(False):
            return rope_tables(int(self.max_seq_len * ratio), self.dim, self.base, ratio, self.dtype, device)


class RotaryFrequencies(_Tables):
    """The rotations of a model's heads, by the pairing and the scaling that ``args`` name.

    "dynamic" scaling remembers the longest sequence it has seen: frequencies follow it upwards, and return to those of
    training when a sequence within the trained length comes. Hugging Face's models do the same.
    """

    inverse: Tensor

    def __init__(self, args: ModelArgs, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.head_dim, self.theta = args.head_dim, args.rope_theta
        self.pairing, self.scaling = args.rope_pairing, args.rope_scaling
        self.longest = 0 if self.scaling is None else self.scaling.max_position_embeddings
        self.reset_tables(torch.device(device))

    def reset_tables(self, device: torch.device) -> None:
        """Compute the frequencies."""
        with torch.inference_mode(False), torch.device("cpu"):
            inverse, self.magnitude = rope_frequencies(self.head_dim, self.theta, self.scaling, self.longest)
        self._set("inverse", inverse.to(device))

    def forward(self, start_pos: int, length: int, padding: Tensor | None = None) -> Rotation:
        """Those of positions ``[start_pos, start_pos + length)``, for ``rotate_heads``.

        ``freqs_cis``, complex ``[length, hd / 2]``, for neighbours; cos and sin ``[length, hd]`` for halves. With
        ``padding [b]`` positions are counted from each row's first real token, and all have a batch dim in front.
        """
        self._follow(start_pos + length)
        positions = torch.arange(start_pos, start_pos + length, device=self.inverse.device)
        if padding is not None:
            positions = (positions - padding.to(positions.device).unsqueeze(1)).clamp_(min=0)
        angles = positions.unsqueeze(-1).float() * self.inverse
        if self.pairing == "neighbours":
            return torch.polar(torch.full_like(angles, self.magnitude), angles)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude

    def _follow(self, length: int) -> None:
        if self.scaling is None or self.scaling.rope_type != "dynamic":
            return
        trained = self.scaling.max_position_embeddings
        if length > self.longest or length < trained < self.longest:
            self.longest = max(length, trained)
            self.reset_tables(self.inverse.device)
