"""The rows of scripts.bench.h200 and their bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .h200_block import block
from .h200_case import Case, Row, Size
from .h200_cases import (
    add_norm,
    cross_entropy,
    embedding,
    group_norm,
    host,
    linear_cross_entropy,
    norm,
    rotation,
    swiglu,
    under_compile,
)

LARGE, SMALL = 65536, 8192
# Of a bar's rows together, in the geometric mean.
GEOMEANS: Mapping[int, Mapping[str, float]] = {1: {"quack": 1.0, "compile": 1.0, "Liger": 1.03}, 2: {"Liger": 1.2}}


class Listed:
    """Rows in the order in which they are added: the most telling ones first."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(
        self, bar: int, name: str, build: Callable[..., Case], *arguments: Any, parts: tuple[int, ...] = (1, 2)
    ) -> None:
        self.rows.append(Row(bar, name, lambda size: build(size, *arguments), parts))


def rows() -> list[Row]:
    """All rows."""
    listed = Listed()
    losses_and_norms(listed)
    other_kernels(listed)
    small_norms(listed)
    blocks_and_host(listed)
    return listed.rows


def losses_and_norms(listed: Listed) -> None:
    losses = {"Liger": 3.0, "TE": 1.8, "flash-attn": 1.0}
    for v in (16384, 131072):
        listed.add(7, f"cross-entropy {v} fwd+bwd", cross_entropy, v, "fwd+bwd", 0.90, losses)
        listed.add(7, f"cross-entropy {v} fwd", cross_entropy, v, "fwd", 0.92, losses | {"compile": 1.8})
        name = f"cross-entropy {v} over its logits fwd+bwd"
        listed.add(7, name, cross_entropy, v, "fwd+bwd", 0.90, {"flash-attn": 1.0}, True)
    for h, share in ((16384, 0.82), (8192, 0.88), (4096, 0.88)):
        listed.add(2, f"norm {h} bwd", norm, LARGE, h, "bwd", share, backward_bars(h))
    for group in (64, 512, 128, 1024):
        listed.add(4, f"norm 8192 groups of {group} fwd+bwd", group_norm, LARGE, group, group_bars(group))
    heads = {"Liger": 2.0, "recomputed in blocks": 1.25}
    listed.add(8, "head and loss 16384 fwd+bwd", linear_cross_entropy, 8192, 16384, 0.90, heads)
    listed.add(8, "head and loss 128256 fwd+bwd", linear_cross_entropy, 4096, 128256, None, {"Liger": 2.0}, 18.3)


def backward_bars(h: int) -> dict[str, float]:
    bars = {"compile": 1.05, "quack": 0.98}
    return bars | {"Liger": 2.5} if h == 16384 else bars


def group_bars(group: int) -> dict[str, float]:
    mamba = {64: {"mamba_ssm": 3.0}, 512: {"mamba_ssm": 1.5}}
    return {"full row": 0.93, "compile": 1.5, **mamba.get(group, {})}


def other_kernels(listed: Listed) -> None:
    listed.add(6, "embedding shard bwd", embedding, "bwd", 0.50, {"Megatron's operations": 3.0})
    listed.add(6, "embedding shard fwd", embedding, "fwd", 0.85, {"Megatron's operations": 2.5})
    for h in (2048, 4096, 8192, 16384):
        listed.add(1, f"norm {h} fwd", norm, LARGE, h, "fwd", 0.90 if h == 2048 else 0.94, {})
    listed.add(3, "add and norm 8192 fwd", add_norm, LARGE, 8192, "fwd", 0.94, {})
    listed.add(3, "add and norm 8192 bwd", add_norm, LARGE, 8192, "bwd", 0.88, {})
    listed.add(3, "add and norm 8192 fwd+bwd", add_norm, LARGE, 8192, "fwd+bwd", None, {"compile": 1.1})
    turns = {"compile": 1.2, "Liger": 2.0}
    for layout in ("b s h d", "packed", "b h s d"):
        listed.add(5, f"rotation {layout} fwd", rotation, layout, "fwd", 0.90, turns)
        listed.add(5, f"rotation {layout} bwd", rotation, layout, "bwd", 0.90, turns | {"own fwd": 0.97})
    for f in (14336, 3584):
        listed.add(9, f"swiglu {f} packed fwd", swiglu, f, "packed", "fwd", 0.95, {})
        listed.add(9, f"swiglu {f} packed bwd", swiglu, f, "packed", "bwd", 0.93, {})
        both = {"Liger": 1.3, "compile": 1.0}
        listed.add(9, f"swiglu {f} packed fwd+bwd", swiglu, f, "packed", "fwd+bwd", None, both)
        for mode in ("fwd", "bwd"):
            listed.add(9, f"swiglu {f} apart {mode}", swiglu, f, "apart", mode, None, {})


def small_norms(listed: Listed) -> None:
    """Ratios to peers alone, where launches and tails show."""
    for h in (16384, 8192, 4096):
        listed.add(2, f"norm {h}, 8192 tokens, bwd", norm, SMALL, h, "bwd", None, backward_bars(h), parts=(2,))
    for group in (64, 512, 128, 1024):
        name = f"norm 8192 groups of {group}, 8192 tokens, fwd+bwd"
        listed.add(4, name, group_norm, SMALL, group, group_bars(group), parts=(2,))
    for h in (2048, 4096, 8192, 16384):
        listed.add(1, f"norm {h}, 8192 tokens, fwd", norm, SMALL, h, "fwd", None, {}, parts=(2,))
    name = "add and norm 8192, 8192 tokens, fwd+bwd"
    listed.add(3, name, add_norm, SMALL, 8192, "fwd+bwd", None, {"compile": 1.1}, parts=(2,))


def blocks_and_host(listed: Listed) -> None:
    listed.add(10, "host time, norm 128 x 4096 fwd+bwd", host, {"Liger": 2.0, "F.rms_norm": 0.5}, parts=(3,))
    listed.add(10, "block of 8B at tp 1 fwd+bwd", block, 1, False, parts=(3,))
    listed.add(11, "compiled: block of 8B at tp 1 fwd+bwd", block, 1, True, parts=(3,))
    operations: dict[str, Callable[[Size], Case]] = {
        "norm 4096 fwd": partial(norm, tokens=LARGE, h=4096, mode="fwd", share=None, bars={}),
        "norm 4096 bwd": partial(norm, tokens=LARGE, h=4096, mode="bwd", share=None, bars={}),
        "add and norm 4096 fwd+bwd": partial(add_norm, tokens=LARGE, h=4096, mode="fwd+bwd", share=None, bars={}),
        "groups of 64 fwd+bwd": partial(group_norm, tokens=LARGE, group=64, bars={}),
        "cross-entropy 16384 fwd+bwd": partial(cross_entropy, columns=16384, mode="fwd+bwd", share=0, bars={}),
        "rotation fwd": partial(rotation, layout="b s h d", mode="fwd", share=0, bars={}),
        "swiglu 14336 fwd+bwd": partial(swiglu, f=14336, layout="packed", mode="fwd+bwd", share=None, bars={}),
        "embedding shard fwd": partial(embedding, mode="fwd", share=0, bars={}),
        "embedding shard bwd": partial(embedding, mode="bwd", share=0, bars={}),
    }
    for name, build in operations.items():
        listed.add(11, f"compiled: {name}", under_compile, build, parts=(3,))
    for world in (2, 4, 8):
        listed.add(11, f"block of 8B at tp {world} fwd+bwd", block, world, False, parts=(3,))
