"""The benchmark for a GPU, run end to end without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts.bench.h200 import versus
from scripts.bench.h200_rows import rows

ROOT = Path(__file__).parent.parent


def dry(out: Path, *words: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "scripts.bench.h200", "--dry", "--out", str(out), *words]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: the extra kernels-test")
@pytest.mark.slow
def test_all_rows_of_a_dry_run(tmp_path: Path) -> None:
    header, *found = dry(tmp_path / "rows.jsonl")
    assert header["ceilings"] and [row["row"] for row in found] == [row.name for row in rows()]
    for row in found:
        assert str(row.get("result", "")).startswith("not measured: src.modeling has no") or (
            row["checks"] == {"error": "pass"} and row["repeatable"]
        ), row


def test_every_bar_has_a_row() -> None:
    """Bar 12, the error, belongs to all of them."""
    assert {row.bar for row in rows()} == set(range(1, 12))


def test_verdicts() -> None:
    assert versus([1.0, 1.1], [3.4, 3.5], 3.0) == "3.29x pass (bar 3)"
    assert versus([1.0, 1.1], [2.0, 2.1], 3.0) == "1.95x miss (bar 3)"
    assert versus([1.0, 1.1], [3.0, 3.2], 3.0) == "2.95x tie (bar 3)"
    assert versus([1.0], [2.0], None) == "2.00x"
