"""Rotary frequencies and the rules that stretch them beyond the trained length.

Each rule follows Hugging Face's implementation of that name to the bit, in its order of operations. Their "dynamic" is
not the rule of ``NTKAwareRoPE``, whose ratio moves in even steps: the two are never exchanged for each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are found; the names are those of Hugging Face's ``rope_parameters``.

    ``max_position_embeddings`` is the length that the model is meant for, ``original_max_position_embeddings`` the one
    it was first trained at (None: the same). ``factor`` None is for "yarn" alone, where it is the ratio of the two.

    Raises ValueError for an unknown ``rope_type``, a factor below 1, and "llama3" without its two frequency factors.
    """

    rope_type: str
    max_position_embeddings: int
    factor: float | None = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type={self.rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
        if self.rope_type != "yarn" if self.factor is None else not self.factor >= 1:
            raise ValueError(f"rope_type={self.rope_type!r} needs a factor of at least 1, not {self.factor}")
        if self.rope_type == "llama3" and (self.low_freq_factor is None or self.high_freq_factor is None):
            raise ValueError("rope_type='llama3' needs low_freq_factor and high_freq_factor")

    @property
    def trained_length(self) -> int:
        """The length of the first training."""
        return self.original_max_position_embeddings or self.max_position_embeddings


def rope_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None = None, length: int | None = None
) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, float32 ``[dim / 2]``, and the factor of all cosines and sines.

    ``length`` is the longest sequence so far; only "dynamic" heeds it. Sources: Su et al. 2021 (RoPE), Peng et al. 2023
    (YaRN), and for the rest the rules as Hugging Face has them.

    Raises ValueError for an odd ``dim``.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"head_dim={dim} must be even and at least 2: channels are rotated in pairs")
    if scaling is None or scaling.rope_type == "default":
        return _frequencies(dim, theta), 1.0
    if scaling.rope_type == "linear":
        assert scaling.factor is not None
        return _frequencies(dim, theta) / scaling.factor, 1.0
    if scaling.rope_type == "dynamic":
        return _dynamic(dim, theta, scaling, length), 1.0
    return (_llama3(dim, theta, scaling), 1.0) if scaling.rope_type == "llama3" else _yarn(dim, theta, scaling)


def _frequencies(dim: int, theta: float | Tensor) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _dynamic(dim: int, theta: float, scaling: RopeScaling, length: int | None) -> Tensor:
    assert scaling.factor is not None
    trained, factor, power = scaling.max_position_embeddings, scaling.factor, dim / (dim - 2)
    if length is None or length <= trained:
        return _frequencies(dim, theta * ((factor * trained / trained) - (factor - 1)) ** power)
    seen = torch.tensor(length, dtype=torch.float32)  # Hugging Face's length is a tensor, its arithmetic float32
    return _frequencies(dim, theta * ((factor * seen / trained) - (factor - 1)) ** power)


def _llama3(dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between interpolated."""
    low, high, factor = scaling.low_freq_factor, scaling.high_freq_factor, scaling.factor
    assert low is not None and high is not None and factor is not None
    frequencies, trained = _frequencies(dim, theta), scaling.trained_length
    wavelengths = 2 * math.pi / frequencies
    scaled = torch.where(wavelengths > trained / low, frequencies / factor, frequencies)
    smooth = (trained / wavelengths - low) / (high - low)
    between = ~(wavelengths < trained / high) * ~(wavelengths > trained / low)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)


def _yarn(dim: int, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Frequencies that turn often are kept, those that turn seldom interpolated, by a ramp over the pairs."""
    trained = scaling.trained_length
    factor = scaling.max_position_embeddings / trained if scaling.factor is None else scaling.factor
    first, last = (
        dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast or 32, scaling.beta_slow or 1)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kept = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first), 0, 1)
    frequencies = 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept
    return frequencies, _attention_factor(factor, scaling)


def _attention_factor(factor: float, scaling: RopeScaling) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1)
