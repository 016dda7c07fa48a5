"""The benchmarks run, and their rows say what was measured; how fast things are decides no test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import chart, table

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str) -> str:
    finished = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_rounds_change_the_order_and_leave_out_the_first() -> None:
    order: list[str] = []

    def contender(name: str) -> float:
        order.append(name)
        return float(len(order))

    results = list(table.rounds([lambda: contender("ours"), lambda: contender("peer")], 3))
    assert order == ["peer", "ours", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert results == [(3.0, 4.0), (6.0, 5.0), (7.0, 8.0)]


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [([1.0, 1.1, 1.2, 1.1], "met"), ([1.0, 1.5, 2.0, 2.9], "tie"), ([3.0, 3.1, 3.2, 2.9], "missed")],
)
def test_a_row_says_whether_the_bar_was_met(tmp_path: Path, ours: list[float], verdict: str) -> None:
    pairs = [(mine, 2.0) for mine in ours]
    found = tmp_path / "table.txt"
    found.write_text(
        "\n".join([table.header(), table.row("norm fp32 fwd+bwd", pairs, 0.75), table.row("plain", pairs)])
    )
    (entry,) = chart.read(found)
    assert (entry.name, entry.bar, entry.verdict) == ("norm fp32 fwd+bwd", 0.75, verdict)
    assert entry.low <= entry.ratio <= entry.high
    chart.draw([entry], tmp_path / "chart.svg")
    picture = (tmp_path / "chart.svg").read_text()
    assert "norm fp32" in picture and [color in picture for color in chart.COLORS.values()].count(True) == 1
    assert chart.COLORS[verdict] in picture


def test_a_table_without_rows_is_no_chart(tmp_path: Path) -> None:
    empty = tmp_path / "table.txt"
    empty.write_text(table.header())
    with pytest.raises(AssertionError, match="no rows with a bar"):
        run("scripts.bench.chart", str(empty), "--out", str(tmp_path / "chart.svg"))


@pytest.mark.slow
def test_import_row() -> None:
    printed = run("scripts.bench.start", "--rounds", "2")
    assert printed.startswith("import after torch: ") and "came along" not in printed


@pytest.mark.slow
def test_training_steps_on_two_processes() -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    printed = run(*launcher, "scripts.bench.steps", "--only", "small", "--rounds", "2")
    assert "step small / dtensor" in printed
    assert "step small / megatron" in printed or "megatron: no peer" in printed
