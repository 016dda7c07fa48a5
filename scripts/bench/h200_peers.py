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
# Single files, because the packages round them need what CUDA builds provide; the last one is the peer, the others
# are imported by it.
FILES = {
    "flash-attn": ["flash_attn/ops/triton/cross_entropy.py"],
    "TE": ["transformer_engine/common/triton/cross_entropy.py", "transformer_engine/pytorch/triton/cross_entropy.py"],
    "mamba_ssm": ["mamba_ssm/ops/triton/layernorm_gated.py"],
}
PACKAGES = {"Liger": "liger_kernel", "quack": "quack.rmsnorm"}


@cache
def imported(name: str) -> ModuleType | Exception:
    """The module of a peer by the name that the table shows, or why there is none."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    try:
        if name in PACKAGES:
            return importlib.import_module(PACKAGES[name])
        return [load(FOLDER, file) for file in FILES[name]][-1]
    except Exception as error:  # packages that find no GPU, driver or compiler raise all kinds
        return error


def library(name: str) -> ModuleType | None:
    """The module of a peer, None without it."""
    found = imported(name)
    return None if isinstance(found, Exception) else found


def load(folder: Path, file: str) -> ModuleType:
    """The module in ``file``, under its own name, without the packages that it lies in."""
    name = file.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, folder / file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def libraries() -> dict[str, str]:
    """All peers that are looked for: there, or why not."""
    found = {name: imported(name) for name in (*PACKAGES, *FILES)}
    return {
        name: f"{type(state).__name__}: {state}" if isinstance(state, Exception) else "there"
        for name, state in found.items()
    }


def available(makers: Mapping[str, Callable[[], Call | None]], stub: Call | None) -> dict[str, Call]:
    """The calls of the peers that are there; ``stub`` in place of all of them."""
    made = {name: make() if stub is None else stub for name, make in makers.items()}
    return {name: call for name, call in made.items() if call is not None}


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
        found = library("quack")
        if found is None:
            return None
        norm = found.rmsnorm

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


def liger_rope(cos: Tensor, sin: Tensor) -> Callable[[], Call | None]:
    """On ``[b, s, heads, hd]``, as the others; Liger wants heads first, and turns them in place where it can."""

    def use(f: Any) -> Call:
        def call(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            a, b = f.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return a.transpose(1, 2), b.transpose(1, 2)

        return call

    return liger("ops.rope", "LigerRopeFunction", use)


def liger_swiglu() -> Callable[[], Call | None]:
    """Of two tensors, copied where they are halves of one; backward writes over them."""
    return liger("ops.swiglu", "LigerSiLUMulFunction", lambda f: f.apply)


def liger_packed_swiglu() -> Callable[[], Call | None]:
    """Of gate and up in one tensor, which gives its gradient in one tensor."""
    return liger("ops.swiglu", "LigerFusedGateUpSiLUMulFunction", lambda f: lambda packed: f.apply(packed, False))


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
    """TE's kernels as its CrossEntropyFunction calls them; forward keeps a copy, which backward writes over."""

    def make() -> Call | None:
        found: Any = library("TE")
        if found is None:
            return None

        class Loss(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                options = 0.0, False, None, -100, False
                loss, *saved, _, _, _ = found.cross_entropy_forward(x[:, None], targets[:, None], *options)
                ctx.save_for_backward(*saved)
                return loss[:, 0]  # type: ignore[no-any-return]

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                options = None, grad, 0.0, False, 0, 1, -100
                return found.cross_entropy_backward(*ctx.saved_tensors, *options)[:, 0]  # type: ignore[no-any-return]

        return Loss.apply

    return make


def megatron_embedding(ids: Tensor, first: int) -> Callable[[], Call]:
    """The operations of Megatron-Core 0.16.1's VocabParallelEmbedding, up to its all-reduce: no library is needed."""
    return lambda: lambda table: peers.megatron_embedding(ids, table, first)
