"""Kernels on one H200, or another GPU, beside the kernels that people know: three calls of a few minutes each.

    python -m scripts.bench.h200 --part 1 --out runs/h200.jsonl    ceilings; own kernels: errors, times, memory, syncs
    python -m scripts.bench.h200 --part 2 --out runs/h200.jsonl    the same rows with peers, in turns; then what is left
    python -m scripts.bench.h200 --part 3 --out runs/h200.jsonl    host time, torch.compile, one block at tp = 1 ... 8
    python -m scripts.bench.h200_counters runs/h200.jsonl          hardware counters of the worst rows, by ncu
    python -m scripts.bench.h200 --dry                             all rows on a CPU, tiny, peers replaced by the body

The second part compiles some 30 functions for torch.compile: where a call may take 10 minutes, ``--seconds 540``.
C is this run's copy bandwidth, G the rate of its bfloat16 product of 8192-wide squares. A row's error is that of at
most 1024 tokens against float64, with NaN in fresh memory, over the error of the body, which takes its statistics in
float32 and rounds to bfloat16 ("error", at most 1.05); what is compiled from the body, or is our own in another way, is
timed alone. Times are medians on inputs of 256 MB or more, or on four sets of them in turns; what takes less than 1 ms
is replayed as a CUDA graph of 20 calls, so that the host counts nothing, and a peer that cannot be is compared with our
own calls from the host. Contenders take turns; "tie" where their rounds overlap the bar. Our own calls are also checked
for host syncs, memory, the same bits again, and replays.

Each row is written to --out as soon as it is there, the most telling ones first; what --seconds left no time for is
"not measured", an absent peer "n/a". ``scripts/bench/h200_peers.sh`` fetches the peers. Not measured by any of these:
overlap through symmetric memory, and more than one GPU (``tests/test_cuda.py`` runs two processes on one).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any
from unittest.mock import patch

import torch

from . import h200_peers
from .h200_case import Beside, Call, Case, Row, Size
from .h200_facts import own_facts, said, verdicts
from .h200_measures import FROM_HOST, Clock, Timer, ceilings, errors, failed, rotated, timed
from .h200_rows import GEOMEANS, rows

ERROR_BAR = 1.05
CALLED = "ours, from the host"


def measure(row: Row, size: Size, with_peers: bool, limits: Mapping[str, float], rounds: int) -> dict[str, Any]:
    """One row as it is written: errors, times in ms, share of the ceiling, ratios to others, verdicts."""
    torch.manual_seed(0)
    small = row.build(size.checking())
    wrong = errors(small, checked_calls(small, size, with_peers))
    del small
    case = row.build(size)
    facts = own_facts(timed(case.ours, case.leaves, case.mode), case, size.device)
    timers = contenders(case, size, with_peers, wrong)
    times = in_turns(timers, rounds)
    result: dict[str, Any] = {"bar": row.bar, "row": row.name, "error": wrong, "work": dict(case.work), **facts}
    result |= {"ms": {name: median(found) for name, found in times.items()}, "rounds ms": times}
    result["timed by"] = {name: timer.how for name, timer in timers.items()}
    passed = not isinstance(wrong["ours"], str) and wrong["ours"] <= ERROR_BAR
    result["checks"] = {"error": said(passed)} | verdicts(case, facts)
    if not size.dry:
        result["checks"] |= reached(case, result, limits, [*case.peers, *case.beside] if with_peers else [])
    return result


def contenders(case: Case, size: Size, with_peers: bool, wrong: dict[str, float | str]) -> dict[str, Timer]:
    """A timer for ours and for each of the others that did not fail; who fails here is added to ``wrong``."""
    calls = checked_calls(case, size, with_peers)
    made: dict[str, Beside | None] = {name: Beside(call, case.leaves, case.mode) for name, call in calls.items()}
    made |= {name: make() for name, make in case.beside.items()} if with_peers else {}
    clock, timers = Clock(size.device), {}
    for name, call in made.items():
        if call is None or isinstance(wrong.get(name), str):
            continue
        try:
            timers[name] = clock.timer(rotated(call.call, call.leaves, call.mode), case.wall)
        except Exception as error:
            if size.dry or name == "ours":
                raise
            wrong[name] = failed(error)
    if timers["ours"].how != FROM_HOST and any(timer.how == FROM_HOST for timer in timers.values()):
        timers[CALLED] = clock.called(rotated(case.ours, case.leaves, case.mode))
    return timers


def checked_calls(case: Case, size: Size, with_peers: bool) -> dict[str, Call]:
    """Ours and the peers that are there; in a dry run the body stands for each of them."""
    found = h200_peers.available(case.peers, case.body if size.dry else None) if with_peers else {}
    return {"ours": case.ours} | found


def in_turns(timers: Mapping[str, Timer], rounds: int) -> dict[str, list[float]]:
    """The times of each contender in each round, every other round in reverse order."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        for name in list(timers)[:: -1 if turn % 2 else 1]:
            times[name].append(timers[name].take())
    return times


def reached(case: Case, result: dict[str, Any], limits: Mapping[str, float], others: Iterable[str]) -> dict[str, str]:
    """Verdicts on time; the shares of the ceilings and ratios to others are added to ``result``."""
    checks: dict[str, str] = {}
    ours, times = result["ms"]["ours"], result["rounds ms"]
    for unit, work in case.work.items():
        share = result[f"of {unit}"] = work / ours / 1e9 / limits[unit]
        if case.share:
            checks[f"{case.share:g} {unit}"] = said(share >= case.share)
    if case.limit_ms is not None:
        checks[f"<= {case.limit_ms:g} ms"] = said(ours <= case.limit_ms)
    result["ratios"] = {}
    for name in others:
        if name not in times:
            checks[name] = str(result["error"].get(name, "n/a"))
            continue
        alike = CALLED if result["timed by"][name] == FROM_HOST and CALLED in times else "ours"
        result["ratios"][name] = median(times[name]) / median(times[alike])
        checks[name] = versus(times[alike], times[name], case.bars.get(name))
    return checks


def versus(ours: Sequence[float], peer: Sequence[float], bar: float | None) -> str:
    """The peer's time over ours, and whether all rounds are on one side of the bar."""
    ratio = f"{median(peer) / median(ours):.2f}x"
    if bar is None:
        return ratio
    low, high = min(peer) / max(ours), max(peer) / min(ours)
    return f"{ratio} {'pass' if low >= bar else 'miss' if high < bar else 'tie'} (bar {bar:g})"


def geomeans(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Verdicts on the rows of a bar together, as far as they were measured."""
    found = []
    for bar, bars in GEOMEANS.items():
        checks = {}
        for name, least in bars.items():
            ratios = [e["ratios"][name] for e in entries if e["bar"] == bar and name in e.get("ratios", {})]
            if ratios:
                mean = geometric_mean(ratios)
                checks[name] = f"{mean:.2f}x {said(mean >= least)} (bar {least:g}, {len(ratios)} rows)"
        if checks:
            found.append({"bar": bar, "row": "geometric means", "checks": checks})
    return found


def environment(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    found: dict[str, Any] = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "device": device}
    found["peers"] = h200_peers.libraries()
    if device == "cuda":
        import triton
        from torch._inductor import config

        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
        found["mix_order_reduction"] = getattr(config.triton, "mix_order_reduction", None)
        found["driver and clocks"] = clocks(shutil.which("nvidia-smi"))
    return found


def clocks(tool: str | None) -> str | None:
    """The driver, and the clocks of processors and memory, as nvidia-smi tells them."""
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def write(path: Path, entry: dict[str, Any]) -> None:
    """Append a line, on the disk before the next row starts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def show(entry: dict[str, Any]) -> None:
    """The row in one line."""
    took = f"{entry['ms']['ours']:9.4f} ms" if "ms" in entry else entry.get("result", "")
    shares = "".join(f" {entry[f'of {unit}']:6.1%} {unit}" for unit in "CG" if f"of {unit}" in entry)
    checks = ", ".join(f"{name}: {verdict}" for name, verdict in entry.get("checks", {}).items())
    print(f"{entry['bar']:>3}  {entry['row']:44} {took}{shares}  {checks}", flush=True)


def run_rows(chosen: Iterable[Row], size: Size, options: argparse.Namespace, limits: Mapping[str, float]) -> None:
    """Measure until ``--seconds`` are over; a row that fails is reported and does not stop the others."""
    began, part = time.monotonic(), options.part
    entries: list[dict[str, Any]] = []
    for row in chosen:
        entry: dict[str, Any] = {"bar": row.bar, "row": row.name}
        if time.monotonic() - began > options.seconds:
            entry["result"] = "not measured: no time left"
        else:
            started = time.monotonic()
            try:
                entry = measure(row, size, part != 1, limits, 1 if size.dry else options.rounds)
            except Exception as error:
                if size.dry:
                    raise
                entry["result"] = failed(error)
            entry["seconds"] = round(time.monotonic() - started, 1)
            torch.compiler.reset()  # whose limit of versions of one function counts all rows
        entries.append(entry)
        report(entry, options)
        if size.device == "cuda":
            torch.cuda.empty_cache()
    for entry in geomeans(entries):
        report(entry, options)


def report(entry: dict[str, Any], options: argparse.Namespace) -> None:
    """On paper and on the screen."""
    write(options.out, {"part": options.part} | entry)
    show(entry)


@contextmanager
def place(size: Size) -> Iterator[None]:
    """Kernels where the rows need them: on a stream that can be captured, or in Triton's interpreter."""
    if size.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        from src.kernels import registry

        with patch.object(registry, "DEVICES", ("cpu",)):
            yield
        return
    from torch._functorch import config

    with torch.cuda.stream(torch.cuda.Stream()), config.patch(donated_buffer=False):  # backward runs many times
        yield


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=[1, 2, 3], default=None, help="(all three, one after the other)")
    parser.add_argument("--seconds", type=float, default=400, help="start no row of a part after them (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contender takes (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/h200.jsonl"), help="(%(default)s)")
    parser.add_argument("--dry", action="store_true", help="on a CPU: tiny, kernels in Triton's interpreter")
    parser.add_argument("rows", nargs="*", help="words in the names of rows (all)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of one part, and append its rows to ``--out``."""
    options = parsed(argv)
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("found no GPU; --dry runs on a CPU")
    size = Size(dry=options.dry)
    parts = [options.part] if options.part else [2, 3] if options.dry else [1, 2, 3]
    with place(size):
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
