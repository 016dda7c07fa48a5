"""What scripts.bench.h200 finds out about our own calls beside their time: bits, host syncs, memory, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .h200_case import Case
from .h200_measures import Run, captured, failed, host_sync, tensors

Facts = dict[str, Any]


def own_facts(run: Run, case: Case, device: str) -> Facts:
    """Of one call, after two that warm up and show whether the bits come again."""
    facts: Facts = {"repeatable": equal(run(), run())}
    if device == "cpu":
        return facts
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    facts["host sync"] = host_sync(run)
    facts["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    facts["inputs MiB"] = sum(leaf.nbytes for leaf in case.leaves) / 2**20
    return facts if case.wall or facts["host sync"] else facts | as_graph(run, case)


def as_graph(run: Run, case: Case) -> Facts:
    """Whether replays of a call give what the call gives, and the time between their kernels where that has a bar."""
    results: list[object] = []
    try:
        graph = captured([run], results)
        graph.replay()
        same = not case.repeatable or equal(results[0], run())
    except RuntimeError as error:
        torch.cuda.synchronize()
        return {"graph": failed(error)}
    facts: Facts = {"graph": same or "replays give other results"}
    if case.gap_us is not None:
        spans = profiled(graph)
        facts |= {"kernels": len(spans), "gaps us": sorted(gaps(spans), reverse=True)[:8]}
    return facts


def equal(one: object, two: object) -> bool:
    """Whether all bits agree, those of any NaN apart."""
    pairs = zip(tensors(one), tensors(two), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def profiled(graph: torch.cuda.CUDAGraph) -> list[tuple[float, float]]:
    """When each kernel of a replay began and ended, in microseconds; a first replay starts the profiler."""
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            graph.replay()
            torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    return [(event.time_range.start, event.time_range.end) for event in events]


def gaps(spans: Iterable[tuple[float, float]]) -> list[float]:
    """The times in which none of the ``spans`` is under way, from the first to the last."""
    found: list[float] = []
    until: float | None = None
    for start, end in sorted(spans):
        if until is not None and start > until:
            found.append(start - until)
        until = end if until is None else max(until, end)
    return found


def verdicts(case: Case, facts: Facts) -> dict[str, str]:
    """One for each fact that has a bar."""
    found = {name: said(proof()) for name, proof in case.proofs.items()}
    if case.repeatable:
        found["repeatable"] = said(facts["repeatable"])
    if "host sync" in facts:
        found["no host sync"] = said(not facts["host sync"])
    if "graph" in facts:
        found["captured"] = "pass" if facts["graph"] is True else f"miss: {facts['graph']}"
    if case.memory is not None and "peak MiB" in facts:
        found[f"memory <= {case.memory / 2**20:.1f} MiB"] = said(facts["peak MiB"] * 2**20 <= case.memory)
    if case.gap_us is not None and "kernels" in facts:
        within = said(all(gap <= case.gap_us for gap in facts["gaps us"]))
        found[f"gaps <= {case.gap_us:g} us"] = within if facts["kernels"] > 1 else "not measured: no kernels seen"
    return found


def said(passed: bool) -> str:
    return "pass" if passed else "miss"
