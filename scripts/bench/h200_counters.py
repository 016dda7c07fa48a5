"""Hardware counters of the rows of scripts.bench.h200 that are furthest from the ceiling, by Nsight Compute.

    python -m scripts.bench.h200_counters runs/h200.jsonl

Of each kernel of one call: bytes of DRAM beside the least that the row needs, hits of the L2 cache, registers,
occupancy, nanoseconds. The clocks are left as they are. Needs ``ncu`` and the right to read counters; without them it
says so.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .h200 import place, write
from .h200_case import Size
from .h200_measures import timed
from .h200_rows import rows

METRICS = {
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "L2 hits %": "lts__t_sector_hit_rate.pct",
    "registers": "launch__registers_per_thread",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "ns": "gpu__time_duration.sum",
}
SECONDS = 120


def worst(entries: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The measured rows with the smallest shares of C, the last measurement of each."""
    latest = {entry["row"]: entry for entry in entries if "of C" in entry and "work" in entry}
    return sorted(latest.values(), key=lambda entry: float(entry["of C"]))[:count]


def command(ncu: str, row: str) -> list[str]:
    """One call of a row under ncu."""
    options = ["--clock-control", "none", "--profile-from-start", "off", "--print-units", "base", "--csv"]
    own = [sys.executable, "-m", "scripts.bench.h200_counters", "--once", row]
    return [ncu, *options, "--metrics", ",".join(METRICS.values()), *own]


def kernels(output: str) -> list[dict[str, Any]]:
    """What ncu printed, one entry for each kernel in their order."""
    names = {metric: name for name, metric in METRICS.items()}
    found: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(line for line in output.splitlines() if line.startswith('"')):
        kernel = found.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
        if line["Metric Name"] in names:
            kernel[names[line["Metric Name"]]] = float(line["Metric Value"].replace(",", ""))
    return list(found.values())


def counted(ncu: str | None, row: str) -> dict[str, Any]:
    """The kernels of a row, or why there are none."""
    if ncu is None:
        return {"result": "not measured: found no ncu"}
    try:
        done = subprocess.run(command(ncu, row), capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"result": f"not measured: ncu took more than {SECONDS} s"}
    found = kernels(done.stdout)
    return {"kernels": found} if found else {"result": f"not measured: {(done.stdout + done.stderr)[-300:]}"}


def once(name: str) -> None:
    """One call of a row between the marks that ncu looks for."""
    (row,) = [row for row in rows() if row.name == name]
    size = Size(dry=False)
    with place(size):
        case = row.build(size)
        run = timed(case.ours, case.leaves, case.mode)
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def show(entry: Mapping[str, Any]) -> None:
    """A row and its kernels."""
    print(f"{entry['row']:44} {entry['of C']:6.1%} C  {entry.get('result', '')}", flush=True)
    found = entry.get("kernels", [])
    for kernel in found:
        print("   " + ", ".join(f"{name} {value:,g}" if name != "kernel" else value for name, value in kernel.items()))
    if found:
        moved = sum(kernel.get("read", 0) + kernel.get("written", 0) for kernel in found)
        print(f"   {moved / entry['least bytes']:.2f} times the least bytes", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the counters, and append them to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="?", help="what scripts.bench.h200 wrote with --out")
    parser.add_argument("--count", type=int, default=3, help="how many rows (%(default)s)")
    parser.add_argument("--once", metavar="ROW", help="call a row once, which is what ncu is given to run")
    options = parser.parse_args(argv)
    if options.once:
        once(options.once)
        return
    if options.measured is None:
        parser.error("name the file that scripts.bench.h200 wrote with --out")
    entries = [json.loads(line) for line in options.measured.read_text().splitlines()]
    for row in worst(entries, options.count):
        entry = {"part": "counters", "row": row["row"], "of C": row["of C"], "least bytes": row["work"]["C"]}
        entry |= counted(shutil.which("ncu"), row["row"])
        write(options.measured, entry)
        show(entry)


if __name__ == "__main__":
    main()
