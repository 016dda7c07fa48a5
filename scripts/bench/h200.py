"""Kernels on one H200, or another GPU, beside the kernels that people know: three calls of a few minutes each.

    python -m scripts.bench.h200 --part 1 --out runs/h200.jsonl    ceilings; own kernels: errors, times, memory, syncs
    python -m scripts.bench.h200 --part 2 --out runs/h200.jsonl    the same rows with peers, in turns; then what is left
    python -m scripts.bench.h200 --part 3 --out runs/h200.jsonl    host time, compiled graphs, one block at tp = 1 ... 8
    python -m scripts.bench.h200 --dry                             all rows on a CPU, tiny, peers replaced by the body

C is this run's copy bandwidth, G the rate of its bfloat16 product of 8192-wide squares. A row's error is that of 1024
tokens against float64, with NaN in fresh memory, over the error of the float32 body ("error", at most 1.05). Times are
medians; what takes less than 0.1 ms is replayed as a CUDA graph of 20 calls, in which small tensors may stay in the L2
cache. Contenders take turns; "tie" where their rounds overlap the bar. Each row is written to --out as soon as it is
there, the most telling ones first; what --seconds left no time for is "not measured", an absent peer "n/a".
``scripts/bench/h200_peers.sh`` fetches the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from . import h200_peers
from .h200_case import Case, Row, Size
from .h200_measures import Clock, ceilings, errors, own_facts, timed
from .h200_rows import rows

ERROR_BAR = 1.05


def measure(row: Row, size: Size, with_peers: bool, limits: Mapping[str, float], rounds: int) -> dict[str, Any]:
    """One row as it is written: errors, times in ms, share of the ceiling, ratios to peers, verdicts."""
    torch.manual_seed(0)
    small = row.build(size.checking())
    wrong = errors(small, contenders(small, size, with_peers))
    case = row.build(size)
    calls = contenders(case, size, with_peers)
    runs = {name: timed(call, case) for name, call in calls.items() if not isinstance(wrong[name], str)}
    result: dict[str, Any] = {"bar": row.bar, "row": row.name, "error": wrong}
    result |= own_facts(runs["ours"], case, size.device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    clock = Clock(size.device)
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            times[name].append((clock.wall if case.wall else clock)(runs[name]))
    result |= {"ms": {name: median(found) for name, found in times.items()}, "rounds ms": times}
    passed = not isinstance(wrong["ours"], str) and wrong["ours"] <= ERROR_BAR
    checks = {"error": "pass" if passed else "miss"}
    if size.dry:
        return result | {"checks": checks}
    for unit, work in case.work.items():
        share = result[f"of {unit}"] = work / result["ms"]["ours"] / 1e9 / limits[unit]
        if case.share is not None:
            checks[f"{case.share:g} {unit}"] = "pass" if share >= case.share else "miss"
    for name in case.peers if with_peers else ():
        failed = wrong.get(name, "n/a")
        checks[name] = versus(times["ours"], times[name], case.bars.get(name)) if name in times else str(failed)
    return result | {"checks": checks}


def contenders(case: Case, size: Size, with_peers: bool) -> dict[str, Callable[..., Any]]:
    """Ours and the peers that are there; in a dry run the body stands for each of them."""
    found = h200_peers.available(case.peers, case.body if size.dry else None) if with_peers else {}
    return {"ours": case.ours} | {name: call for name, call in found.items() if call is not None}


def versus(ours: Sequence[float], peer: Sequence[float], bar: float | None) -> str:
    """The peer's time over ours, and whether all rounds are on one side of the bar."""
    ratio = f"{median(peer) / median(ours):.2f}x"
    if bar is None:
        return ratio
    low, high = min(peer) / max(ours), max(peer) / min(ours)
    return f"{ratio} {'pass' if low >= bar else 'miss' if high < bar else 'tie'} (bar {bar:g})"


def environment(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    found: dict[str, Any] = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "device": device}
    found["peers"] = {name: state is not None for name, state in h200_peers.libraries().items()}
    if device == "cuda":
        import triton
        from torch._inductor import config

        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
        found["mix_order_reduction"] = getattr(config.triton, "mix_order_reduction", None)
    return found


def write(path: Path, entry: dict[str, Any]) -> None:
    """Append a line, on the disk before the next row starts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def show(entry: dict[str, Any]) -> None:
    """The row in one line."""
    if "ms" not in entry:
        print(f"{entry['bar']:>3}  {entry['row']:44} {entry['result']}", flush=True)
        return
    shares = "".join(f" {entry[f'of {unit}']:6.1%} {unit}" for unit in "CG" if f"of {unit}" in entry)
    verdicts = ", ".join(f"{name}: {verdict}" for name, verdict in entry["checks"].items())
    print(f"{entry['bar']:>3}  {entry['row']:44} {entry['ms']['ours']:9.4f} ms{shares}  {verdicts}", flush=True)


def run_rows(chosen: Iterable[Row], size: Size, options: argparse.Namespace, limits: Mapping[str, float]) -> None:
    """Measure until ``--seconds`` are over; a row that fails is reported and does not stop the others."""
    began, part = time.monotonic(), options.part
    for row in chosen:
        entry: dict[str, Any] = {"bar": row.bar, "row": row.name}
        if time.monotonic() - began > options.seconds:
            entry["result"] = "not measured: no time left"
        else:
            try:
                entry = measure(row, size, part != 1, limits, 1 if size.dry else options.rounds)
            except h200_peers.Missing as missing:
                entry["result"] = f"not measured: {missing}"
            except (RuntimeError, ValueError, TypeError) as error:
                if size.dry:
                    raise
                entry["result"] = f"failed: {type(error).__name__}: {error}"[:300]
        write(options.out, {"part": part} | entry)
        show(entry)
        if size.device == "cuda":
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of one part, and append its rows to ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=[1, 2, 3], default=None, help="(all three, one after the other)")
    parser.add_argument("--seconds", type=float, default=400, help="start no row of a part after them (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contender takes (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/h200.jsonl"), help="(%(default)s)")
    parser.add_argument("--dry", action="store_true", help="on a CPU: tiny, kernels in Triton's interpreter")
    parser.add_argument("rows", nargs="*", help="words in the names of rows (all)")
    options = parser.parse_args(argv)
    if not options.dry and not torch.cuda.is_available():
        parser.error("found no GPU; --dry runs on a CPU")
    size = Size(dry=options.dry)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    from src.kernels import registry

    parts = [options.part] if options.part else [2, 3] if options.dry else [1, 2, 3]
    with patch.object(registry, "DEVICES", ("cpu",)) if options.dry else nullcontext():
        limits = ceilings(Clock(size.device), size.device)
        write(options.out, {"part": parts[0], "environment": environment(size.device), "ceilings": limits})
        dry = "a dry run: the times mean nothing"
        print(dry if size.dry else f"C {limits['C']:.2f} TB/s, G {limits['G']:.0f} TFLOP/s", flush=True)
        for options.part in parts:
            found = [row for row in rows() if options.part in row.parts]
            words = options.rows
            run_rows([r for r in found if not words or any(w in r.name for w in words)], size, options, limits)


if __name__ == "__main__":
    main()
