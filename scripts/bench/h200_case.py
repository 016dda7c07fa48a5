"""What a row of scripts.bench.h200 is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

CHECKED = 1024
Mode = Literal["fwd", "bwd", "fwd+bwd"]
Call = Callable[..., Any]
Peers = Mapping[str, Callable[[], Call | None]]


@dataclass(frozen=True)
class Size:
    """How large tensors are: as in the row, with few tokens to be held against float64, or tiny on a CPU."""

    dry: bool
    check: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def checking(self) -> Size:
        """The same with as many tokens as float64 has room for."""
        return replace(self, check=True)

    def tokens(self, number: int) -> int:
        return 4 if self.dry else min(number, CHECKED) if self.check else number

    def width(self, number: int) -> int:
        return min(number, 64) if self.dry else number

    def drawn(self, *shape: int) -> Tensor:
        """Normal numbers in bfloat16, or on a CPU, where Triton's interpreter truncates those, in float32."""
        return torch.randn(shape, device=self.device).to(torch.float32 if self.dry else torch.bfloat16)

    def compiled(self, call: Call) -> Call:
        """``call`` by torch.compile for these shapes, in one graph; on a CPU traced, and not compiled."""
        return torch.compile(call, dynamic=False, fullgraph=True, backend="eager" if self.dry else "inductor")


@dataclass(frozen=True)
class Beside:
    """What takes turns with ours to be timed, and is not held against the body."""

    call: Call
    leaves: Sequence[Tensor]
    mode: Mode


@dataclass(frozen=True)
class Case:
    """``ours`` and ``body``, the same in plain torch with its statistics in float32, of ``leaves``.

    ``work`` in bytes of C or operations of G; ``share`` of that ceiling and the others' time over ours (``bars``) are
    what the row is to reach, in at most ``limit_ms``. ``memory`` has the bytes that a call may need beyond what was
    there, its results included. ``gap_us`` bounds the time between the kernels of a replayed graph. ``proofs`` are
    checked once. ``wall`` rows are timed on the host; all have the same bits again unless ``repeatable`` is False.
    """

    ours: Call
    body: Call
    leaves: list[Tensor]
    mode: Mode
    work: Mapping[str, float]
    share: float | None = None
    peers: Peers = field(default_factory=dict)
    beside: Mapping[str, Callable[[], Beside | None]] = field(default_factory=dict)
    bars: Mapping[str, float] = field(default_factory=dict)
    limit_ms: float | None = None
    memory: float | None = None
    gap_us: float | None = None
    proofs: Mapping[str, Callable[[], bool]] = field(default_factory=dict)
    repeatable: bool = True
    wall: bool = False

    def with_compiled(self, size: Size) -> Case:
        """The same with the body by torch.compile beside it."""
        call = self.body if size.dry else size.compiled(self.body)
        return replace(self, beside={**self.beside, "compile": partial(Beside, call, self.leaves, self.mode)})


@dataclass(frozen=True)
class Row:
    """Number of the bar, in which parts the row is measured, and how it is built."""

    bar: int
    name: str
    build: Callable[[Size], Case]
    parts: tuple[int, ...] = (1, 2)
