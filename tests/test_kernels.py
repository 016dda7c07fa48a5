"""When a kernel is chosen, and the kernels themselves: ``kernel_checks.py`` and ``accumulation_checks.py`` in the
interpreter and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src import functional as fn
from src.kernels import lookup, registry

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: the extra kernels-test")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, found none")


def run(*commands: Sequence[str], **environment: str) -> None:
    """All at once."""
    options: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, **environment}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    running = [subprocess.Popen([sys.executable, *command], **pipes, **options) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-8000:]


PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-x")
CHECKS = [(*PYTEST, "tests/kernel_checks.py"), (*PYTEST, "tests/accumulation_checks.py")]


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    run(*CHECKS, TRITON_INTERPRET="1")


@needs_triton
@needs_gpu
def test_kernels_on_a_gpu() -> None:
    run(*CHECKS, TRITON_INTERPRET="0")


def test_a_cpu_never_imports_triton() -> None:
    use = "fn.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)"
    run(("-c", f"import sys, torch, src.modeling, src.functional as fn; {use}; assert 'triton' not in sys.modules"))


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEVICES", ("cpu",))


X, W = torch.ones(2, 8), torch.ones(8)


class Subclass(Tensor):
    pass


@needs_triton
@pytest.mark.usefixtures("anywhere")
def test_lookup_finds_kernels() -> None:
    assert lookup("group_rms_norm", X, nn.Parameter(W), 4) is not None
    assert lookup("swiglu", X.half(), X.half()) is not None
    assert lookup("add_group_rms_norm", X, W, 4, X.clone()) is not None


@needs_triton
@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    "op, arguments",
    [
        ("group_rms_norm", (X.double(), W, 4)),
        ("group_rms_norm", (X, W.double(), 4)),
        ("group_rms_norm", (X, W.to("meta"), 4)),
        ("group_rms_norm", (X.as_subclass(Subclass), W, 4)),
        ("group_rms_norm", (X, torch.ones(1), 4)),
        ("group_rms_norm", (X, W, 3)),
        ("group_rms_norm", (torch.ones(1, 32768), torch.ones(32768), 32768)),
        ("add_group_rms_norm", (X, W, 4, X[:1])),
        ("add_group_rms_norm", (X, W, 4, X.half())),
        ("add_group_rms_norm", (X, W, 4, X.as_subclass(Subclass))),
        ("swiglu", (X, X[:1])),
        ("swiglu", (X, X.half())),
        ("rotate", ((torch.ones(1, 3, 2, 8),), fn.rope_tables(4, 8, 1e4))),
        ("rotate", ((torch.ones(1, 3, 2, 8),), (W.expand(3, 8), W.expand(3, 8).clone().requires_grad_()))),
        ("rotate", ((torch.ones(1, 4, 2, 8),), (fn.precompute_freqs_cis(8, 4).to(torch.complex128),))),
        ("shard_embedding", (torch.zeros(2), X)),
        ("cross_entropy_statistics", (X.t(), torch.zeros(8, dtype=torch.int64))),
    ],
)
def test_lookup_leaves_the_rest_to_the_body(op: str, arguments: tuple[Any, ...]) -> None:
    assert lookup(op, *arguments) is None


def test_small_tensors_on_a_cpu_are_left_to_the_body() -> None:
    assert lookup("group_rms_norm", X, W, 4) is None
    assert lookup("swiglu", X, X) is None


@pytest.mark.usefixtures("anywhere")
def test_lookup_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_has_triton", lambda: False)
    assert lookup("group_rms_norm", X, W, 4) is None


@needs_triton
@pytest.mark.usefixtures("anywhere")
def test_compile_and_transforms_see_the_body() -> None:
    compiled: Any = torch.compile(fn.rms_norm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X, W, 1e-5), X, rtol=1e-4, atol=1e-4)
    grad = torch.func.grad(lambda x: fn.rms_norm(x, W, 1e-5).sum())(X)
    torch.testing.assert_close(grad, torch.zeros_like(X), rtol=0, atol=1e-4)
