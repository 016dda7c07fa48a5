"""Rotary position embeddings as modules: tables that follow the device, keep their dtype, and grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import apply_rotary_pos_emb, precompute_freqs_cis, rope_tables


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
    """Llama 3's ``freqs_cis`` for positions ``[0, length)``."""

    freqs_cis: Tensor

    def __init__(self, head_dim: int, length: int, theta: float, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.head_dim, self.length, self.theta = head_dim, length, theta
        self.reset_tables(torch.device(device))

    def reset_tables(self, device: torch.device) -> None:
        """Compute the table."""
        self._set("freqs_cis", precompute_freqs_cis(self.head_dim, self.length, self.theta).to(device))

    def forward(self, start_pos: int, length: int) -> Tensor:
        """Rows ``[start_pos, start_pos + length)``: complex ``[length, head_dim / 2]``."""
        return self.freqs_cis[start_pos : start_pos + length]
