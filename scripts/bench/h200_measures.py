"""How scripts.bench.h200 measures a call: time and error."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from .h200_case import Call, Case, Mode

SHORT_MS = 1.0
CALLS = 20
COLD = 2**28
NOISE = 5e-7
FROM_HOST = "calls from the host"
Run = Callable[[], object]


@dataclass(frozen=True)
class Timer:
    """How a call is timed, and ``take``, which gives milliseconds of one."""

    how: str
    take: Callable[[], float]


class Clock:
    """Milliseconds of calls on ``device``; on a CPU, where only the path matters, of a single one."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def timer(self, call: Run, wall: bool = False) -> Timer:
        """Replays of a CUDA graph where the host may be slower than a GPU; a call that waits for it has no graph."""
        if wall:
            return Timer("host", lambda: self._wall(call))
        if not self.on_gpu:
            return Timer("once", lambda: once(call))
        if bench(call, warmup=10, rep=20) > SHORT_MS:
            return Timer("calls", lambda: bench(call))
        if host_sync(call):
            return self.called(call)
        try:
            graph = captured([call] * CALLS)
        except RuntimeError:
            torch.cuda.synchronize()
            return self.called(call)
        return Timer("graph", lambda: bench(graph.replay) / CALLS)

    def called(self, call: Run) -> Timer:
        """Short calls from the host, whatever that takes."""
        return Timer(FROM_HOST, lambda: bench(call))

    def _wall(self, call: Run) -> float:
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


def once(call: Run) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def bench(call: Run, warmup: int = 25, rep: int = 100) -> float:
    """The median on the GPU, the L2 cache emptied before each call."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=warmup, rep=rep, return_mode="median"))


def host_sync(call: Run) -> str:
    """How a call waits for the GPU; empty if it does not."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return failed(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def captured(calls: Sequence[Run], results: list[object] | None = None) -> torch.cuda.CUDAGraph:
    """The calls as one graph, and their ``results``, which each replay writes again.

    It is captured on the current stream, where backward runs the kernels of a forward that ran there before.
    """
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in calls:
            found = call()
            if results is not None:
                results.append(found)
    return graph


def ceilings(clock: Clock, device: str) -> dict[str, float]:
    """C in TB/s of a copy's reads and writes, G in TFLOP/s: the better of two each."""
    dry = device == "cpu"
    source = torch.randn(2**10 if dry else 2**31, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = min(clock.timer(lambda: target.copy_(source)).take() for _ in range(2))
    width = 64 if dry else 8192
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    multiplied = min(clock.timer(lambda: a @ b).take() for _ in range(2))
    return {"C": 2 * source.nbytes / copied / 1e9, "G": 2 * width**3 / multiplied / 1e9}


def outputs(call: Call, leaves: Sequence[Tensor], mode: Mode) -> list[Tensor]:
    """What ``call`` gives for copies of ``leaves`` and, unless ``mode`` is "fwd", its gradients in them."""
    fresh = [like(leaf).requires_grad_(mode != "fwd") for leaf in leaves]
    ys = tensors(call(*fresh))
    if mode == "fwd":
        return [y.detach() for y in ys]
    gradients = torch.autograd.grad(ys, fresh, [seeded(i, y) for i, y in enumerate(ys)])
    return [y.detach() for y in (*ys, *gradients)]


def like(leaf: Tensor) -> Tensor:
    """A copy with the same strides, gaps included."""
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device).copy_(leaf.detach())


def tensors(found: object) -> list[Tensor]:
    """The tensors of a result."""
    return [found] if isinstance(found, Tensor) else [t for t in found if isinstance(t, Tensor)]  # type: ignore[attr-defined]


def seeded(seed: int, like: Tensor) -> Tensor:
    """A gradient for ``like``, the same numbers at each call."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)


def errors(case: Case, calls: Mapping[str, Call]) -> dict[str, float | str]:
    """The largest relative error of each call over that of the body, which rounds to the row's dtype where it must.

    Of a call that fails, the error's text; ours may not fail.
    """
    exact = outputs(case.body, [leaf.double() for leaf in case.leaves], case.mode)
    rounded = outputs(case.body, case.leaves, case.mode)
    found: dict[str, float | str] = {}
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    try:
        for name, call in calls.items():
            try:
                got = outputs(call, case.leaves, case.mode)
            except Exception as error:
                if name == "ours":
                    raise
                found[name] = failed(error)
                continue
            triples = zip(got, rounded, exact, strict=True)
            ratios = [distance(y, want) / max(distance(body, want), NOISE) for y, body, want in triples]
            found[name] = max(ratios, key=lambda ratio: (ratio != ratio, ratio))
    finally:
        torch.use_deterministic_algorithms(False)
    return found


def failed(error: Exception) -> str:
    return " ".join(f"failed: {type(error).__name__}: {error}".split())[:300]


def distance(got: Tensor, want: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def timed(call: Call, leaves: Sequence[Tensor], mode: Mode) -> Run:
    """The part of ``call`` that ``mode`` names, without arguments."""
    leaves = [leaf.detach().requires_grad_(mode != "fwd") for leaf in leaves]
    if mode == "fwd":
        return torch.no_grad()(lambda: call(*leaves))
    if mode == "bwd":
        ys = tensors(call(*leaves))
        grads = [seeded(i, y) for i, y in enumerate(ys)]
        return lambda: torch.autograd.grad(ys, leaves, grads, retain_graph=True)
    grads = [seeded(i, y) for i, y in enumerate(tensors(call(*leaves)))]
    return lambda: torch.autograd.grad(tensors(call(*leaves)), leaves, grads)


def rotated(call: Call, leaves: Sequence[Tensor], mode: Mode) -> Run:
    """``timed`` on copies of ``leaves`` in turns, more than a cache holds; some peers write over theirs."""
    copies = min(4, -(-COLD // max(1, sum(leaf.nbytes for leaf in leaves))))
    runs = cycle([timed(call, list(map(like, leaves)), mode) for _ in range(copies)])
    return lambda: next(runs)()
