"""What the kernels are measured against, from ``.peers/`` (``h200_peers.sh``) or installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import peers

FOLDER = Path(__file__).parents[2] / ".peers"
Call = Callable[..., Any]
# Single files, because the packages round them need what CUDA builds provide.
FILES = {
    "flash-attn": "flash_attn/ops/triton/cross_entropy.py",
    "TE": "transformer_engine/pytorch/triton/cross_entropy.py",
    "mamba_ssm": "mamba_ssm/ops/triton/layernorm_gated.py",
}
PACKAGES = {"Liger": "liger_kernel", "quack": "quack", "Megatron": "megatron.core"}


class Missing(Exception):
    """What a row needs and does not find."""


@cache
def library(name: str) -> ModuleType | None:
    """The module of a peer by the name that the table shows, None without it."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    try:
        if name in PACKAGES:
            return importlib.import_module(PACKAGES[name])
        path = FOLDER / FILES[name]
        spec = importlib.util.spec_from_file_location(path.stem + "_peer", path)
        if spec is None or spec.loader is None or not path.exists():
            return None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (ImportError, RuntimeError, OSError, AttributeError):
        return None


def libraries() -> dict[str, ModuleType | None]:
    """All peers that are looked for."""
    return {name: library(name) for name in (*PACKAGES, *FILES)}


def available(makers: Mapping[str, Callable[[], Call | None]], stub: Call | None) -> dict[str, Call | None]:
    """The calls of the peers that are there, None for the others; ``stub`` in place of all of them."""
    return {name: make() if stub is None else stub for name, make in makers.items()}


def compiled(call: Call) -> Callable[[], Call]:
    """``call`` by torch.compile for these shapes."""
    return lambda: torch.compile(call, dynamic=False, fullgraph=True)


def liger(path: str, name: str, use: Callable[[Any], Call]) -> Callable[[], Call | None]:
    """``use`` of ``liger_kernel.<path>.<name>``."""

    def make() -> Call | None:
        if library("Liger") is None:
            return None
        try:
            return use(getattr(importlib.import_module(f"liger_kernel.{path}"), name))
        except (ImportError, AttributeError):
            return None

    return make


def quack_norm(eps: float) -> Callable[[], Call | None]:
    """``quack.rmsnorm``, of a sum where a residual is given."""

    def make() -> Call | None:
        if library("quack") is None:
            return None
        try:
            norm = importlib.import_module("quack.rmsnorm").rmsnorm
        except ImportError:
            return None

        def call(x: Tensor, *rest: Tensor) -> Any:
            *residual, weight = rest
            if residual:
                return norm(x, weight, residual=residual[0], eps=eps, prenorm=True)
            return norm(x, weight, eps=eps)

        return call

    return make


def mamba_norm(size: int, eps: float) -> Callable[[], Call | None]:
    """The grouped norm of mamba_ssm, ungated."""

    def make() -> Call | None:
        found = library("mamba_ssm")
        return None if found is None else lambda x, w: found.rmsnorm_fn(x, w, None, eps=eps, group_size=size)

    return make


def liger_norm(eps: float) -> Callable[[], Call | None]:
    return liger("ops.rms_norm", "LigerRMSNormFunction", lambda f: lambda x, w: f.apply(x, w, eps, 0.0, "llama", False))


def liger_add_norm(eps: float) -> Callable[[], Call | None]:
    use = lambda f: lambda x, r, w: f.apply(x, r, w, eps, 0.0, "llama", False)  # noqa: E731
    return liger("ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction", use)


def liger_rope() -> Callable[[], Call | None]:
    """On ``[b, s, heads, hd]``, as the others; Liger wants heads first."""

    def use(f: Any) -> Call:
        def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            a, b = f.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return a.transpose(1, 2), b.transpose(1, 2)

        return call

    return liger("ops.rope", "LigerRopeFunction", use)


def liger_swiglu() -> Callable[[], Call | None]:
    return liger("ops.swiglu", "LigerSiLUMulFunction", lambda f: f.apply)


def liger_cross_entropy(targets: Tensor) -> Callable[[], Call | None]:
    def use(f: Any) -> Call:
        return lambda x: f.apply(x[:, None], targets[:, None], None, -100, 0.0, "megatron", "partition")[:, 0]

    return liger("ops.vocab_parallel_cross_entropy", "LigerVocabParallelCEFunction", use)


def liger_linear_cross_entropy(targets: Tensor) -> Callable[[], Call | None]:
    def use(f: Any) -> Call:
        def call(x: Tensor, weight: Tensor) -> Tensor:
            found = f.apply(x, weight, targets)
            return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

        return call

    return liger("ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", use)


def flash_cross_entropy(targets: Tensor, inplace: bool) -> Callable[[], Call | None]:
    def make() -> Call | None:
        found = library("flash-attn")
        return None if found is None else lambda x: found.cross_entropy_loss(x, targets, inplace_backward=inplace)[0]

    return make


def transformer_engine_cross_entropy(targets: Tensor) -> Callable[[], Call | None]:
    """TE's two kernels; the first one writes the gradient over the logits, of which it gets a copy where they stay."""

    def make() -> Call | None:
        found: Any = library("TE")
        if found is None:
            return None

        class Loss(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                loss, statistics = found.cross_entropy_forward(x[:, None], targets[:, None], 0.0, False, None, -100)
                ctx.save_for_backward(x, statistics)
                return loss[:, 0]  # type: ignore[no-any-return]

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                x, statistics = ctx.saved_tensors
                arguments = (targets[:, None], statistics, grad.contiguous(), 0.0, False, None)
                return found.cross_entropy_backward(x.detach()[:, None], *arguments)[:, 0]  # type: ignore[no-any-return]

        return Loss.apply

    return make


def megatron_embedding(ids: Tensor, first: int) -> Callable[[], Call]:
    """The operations of Megatron-Core 0.16.1's VocabParallelEmbedding, up to its all-reduce: no library is needed."""
    return lambda: lambda table: peers.megatron_embedding(ids, table, first)
