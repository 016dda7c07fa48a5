"""How scripts.bench.h200 measures a call: time, error, memory, host syncs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .h200_case import Case

SHORT_MS = 0.1
CALLS = 20
NOISE = 5e-7


class Clock:
    """Milliseconds of calls on ``device``; on a CPU, where only the path matters, of a single one."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def __call__(self, call: Callable[[], object]) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3
        from triton.testing import do_bench

        found = float(do_bench(call, warmup=10, rep=20, return_mode="median"))
        if found > SHORT_MS:
            return float(do_bench(call, warmup=50, rep=200, return_mode="median"))
        try:
            return self._replayed(call)
        except RuntimeError:  # not every peer can be captured
            torch.cuda.synchronize()
            return found

    def wall(self, call: Callable[[], object]) -> float:
        """Of the host: many calls, one synchronization."""
        calls = 1000 if self.on_gpu else 1
        for _ in range(calls // 10):
            call()
        self._synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        self._synchronize()
        return (time.perf_counter() - began) * 1e3 / calls

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _replayed(self, call: Callable[[], object]) -> float:
        from triton.testing import do_bench

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call()
        return float(do_bench(graph.replay, warmup=20, rep=100, return_mode="median")) / CALLS


def ceilings(clock: Clock, device: str) -> dict[str, float]:
    """C in TB/s of a copy's reads and writes, G in TFLOP/s: the better of two each."""
    dry = device == "cpu"
    source = torch.randn(2**10 if dry else 2**31, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = min(clock(lambda: target.copy_(source)) for _ in range(2))
    width = 64 if dry else 8192
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    multiplied = min(clock(lambda: a @ b) for _ in range(2))
    return {"C": 2 * source.nbytes / copied / 1e9, "G": 2 * width**3 / multiplied / 1e9}


def outputs(call: Callable[..., Any], leaves: Sequence[Tensor], mode: str) -> list[Tensor]:
    """What ``call`` gives for copies of ``leaves`` and, unless ``mode`` is "fwd", its gradients in them."""
    fresh = [leaf.detach().clone().requires_grad_(mode != "fwd") for leaf in leaves]
    found = call(*fresh)
    ys = list(found) if isinstance(found, tuple) else [found]
    if mode == "fwd":
        return [y.detach() for y in ys]
    gradients = torch.autograd.grad(ys, fresh, [seeded(i, y) for i, y in enumerate(ys)])
    return [y.detach() for y in ys] + list(gradients)


def seeded(seed: int, like: Tensor) -> Tensor:
    """A gradient for ``like``, the same numbers at each call."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)


def errors(case: Case, calls: Mapping[str, Callable[..., Any]]) -> dict[str, float | str]:
    """The largest relative error of each call over that of the body in float32, rounded as the call's results are.

    Of a call that fails, the error's text; ours may not fail.
    """
    exact = outputs(case.body, [leaf.double() for leaf in case.leaves], case.mode)
    rounded = outputs(case.body, [leaf.float() for leaf in case.leaves], case.mode)
    found: dict[str, float | str] = {}
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    try:
        for name, call in calls.items():
            try:
                got = outputs(call, case.leaves, case.mode)
            except Exception as error:
                if name == "ours":
                    raise
                found[name] = f"failed: {type(error).__name__}: {error}"[:200]
                continue
            triples = zip(got, rounded, exact, strict=True)
            ratios = [distance(y, want) / max(distance(body.to(y.dtype), want), NOISE) for y, body, want in triples]
            found[name] = max(ratios, key=lambda ratio: (ratio != ratio, ratio))
    finally:
        torch.use_deterministic_algorithms(False)
    return found


def distance(got: Tensor, want: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def timed(call: Callable[..., Any], case: Case) -> Callable[[], object]:
    """The part of ``call`` that the row is about, without arguments."""
    leaves = [leaf.detach().requires_grad_(case.mode != "fwd") for leaf in case.leaves]
    if case.mode == "fwd":
        return torch.no_grad()(lambda: call(*leaves))

    def make() -> list[Tensor]:
        found = call(*leaves)
        return list(found) if isinstance(found, tuple) else [found]

    if case.mode == "bwd":
        ys = make()
        grads = [seeded(i, y) for i, y in enumerate(ys)]
        return lambda: torch.autograd.grad(ys, leaves, grads, retain_graph=True)
    grads = [seeded(i, y) for i, y in enumerate(make())]
    return lambda: torch.autograd.grad(make(), leaves, grads)


def own_facts(run: Callable[[], object], case: Case, device: str) -> dict[str, Any]:
    """Host syncs, repeatability, and memory beyond what was there, of one call."""
    first, second = run(), run()
    pairs = zip(flat(first), flat(second), strict=True)
    facts: dict[str, Any] = {"repeatable": all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)}
    del first, second
    if device == "cpu":
        return facts
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        facts["host syncs"] = 0
    except RuntimeError as error:
        facts["host syncs"] = str(error)[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    facts["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    facts["inputs MiB"] = sum(leaf.nbytes for leaf in case.leaves) / 2**20
    return facts


def flat(found: object) -> list[Tensor]:
    """The tensors of a result."""
    return [found] if isinstance(found, Tensor) else [t for t in found if isinstance(t, Tensor)]  # type: ignore[attr-defined]
