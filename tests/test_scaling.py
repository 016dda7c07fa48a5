"""Step times on paper: from the ledger's bytes, and labelled as what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.bench import scaling
from scripts.plan import MODELS
from scripts.planning import Job, plan_rank
from src.modeling import ModelArgs

ARGS = ModelArgs(dim=64, n_layers=3, n_heads=8, n_kv_heads=8, vocab_size=128, ffn_dim=96)


def work(tp: int) -> tuple[scaling.Work, int]:
    plan = plan_rank(Job(ARGS, 2, 16, torch.bfloat16, sequence_parallel=True), tp)
    return scaling.work_of(ARGS, plan, 2, 16, True), sum(record.wire_bytes for record in plan.ledger.records)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_work_by_hand(tp: int) -> None:
    found, sent = work(tp)
    assert found.sent == sent and (sent > 0) == (tp > 1)
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * 96) + 128 * 64
    assert found.products == 6 * 32 * matrices / tp
    assert found.attention == 3 * 7 * 32 * 16 * 64 / tp
    elements, tables = 32 * 64 // tp, 2 * 4 * 32 * 2 * 64 // tp
    parameters = (matrices + 128 * 64) // tp + 7 * 64
    layers = 3 * (38 * elements + 16 * 32 * 96 // tp + tables)
    assert found.copied == layers + 6 * 32 * 128 // tp + 10 * elements + 22 * parameters


def test_seconds_by_hand() -> None:
    machine = scaling.Machine(100.0, 10.0, (0.5, 1.0), (0.25, 0.5), (0.5, 1.0), 1.0, (2.0, 4.0))
    alone, halves = scaling.Work(100, 50, 20, 0, 0), scaling.Work(50, 25, 10, 1, 8)
    one, two = scaling.predict({1: alone, 2: halves}, machine)
    assert (one.slow, one.fast, one.efficiency) == (2 + 2 + 4, 1 + 1 + 2, (1.0, 1.0))
    assert (two.slow, two.fast) == (2 / 2 + 2 / 2 + 4 / 2 + 1 + 4, 1 + 2)
    assert two.efficiency == (2 / (2 + 5), 2 / 3)


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 8, "vocab_size": 128}
    monkeypatch.setitem(MODELS, "llama3-8b", small)
    scaling.main(["llama3-8b", "--seq-len", "16", "--no-published"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("prediction, not a measurement")
    rows = [line for line in shown if line.startswith("llama3-8b")]
    assert [line.split()[1] for line in rows] == ["1", "2", "4", "8"] and rows[0].endswith("100% .. 100%")


def test_ceilings_are_said_to_be_noted_figures() -> None:
    machine, page = scaling.Machine(), (Path(__file__).parent.parent / "docs/scaling.md").read_text()
    for text in (scaling.__doc__ or "", page):
        said = " ".join(text.split())
        for figure in (f"{machine.products / 1e12:g} TFLOP/s", f"{machine.copies / 1e12:g} TB/s", "noted figures"):
            assert figure in said
        assert "measured on an H200" not in said.lower()
