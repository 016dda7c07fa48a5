"""The benchmark for a GPU, run end to end without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.bench import h200, h200_counters, h200_facts, h200_measures
from scripts.bench.h200_case import Call, Case, Row, Size
from scripts.bench.h200_rows import rows

ROOT = Path(__file__).parent.parent


def dry(out: Path, *words: str) -> list[dict[str, Any]]:
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
        assert set(row["checks"].values()) == {"pass"}, row
        others = set(row["ms"]) - {"ours"}
        assert row["bar"] in (9, 10) or "tp" in row["row"] or others, row


def test_every_bar_has_a_row() -> None:
    """Bar 12, the error, belongs to all of them."""
    assert {row.bar for row in rows()} == set(range(1, 12))
    assert len({row.name for row in rows()}) == len(rows())


class Pretended(Size):
    """What a GPU would get, tiny and on a CPU."""

    device = "cpu"  # type: ignore[assignment]

    def tokens(self, number: int) -> int:
        return 4

    def width(self, number: int) -> int:
        return min(number, 64)

    def compiled(self, call: Call) -> Call:
        return torch.compile(call, dynamic=False, fullgraph=True, backend="eager")


class Graph:
    """A CUDA graph that captures nothing."""

    def replay(self) -> None: ...


@contextmanager
def nothing(*arguments: Any, **options: Any) -> Iterator[None]:
    yield


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """``measure`` of a row on a GPU whose every call takes 2 ms, or of short calls 0.5 ms."""

    def facts(run: Any, case: Case, device: str) -> Any:
        return own_facts(run, case, "cuda")

    own_facts, memory = h200_facts.own_facts, iter(range(0, 10**12, 2**20))
    monkeypatch.setattr(h200, "own_facts", facts)
    monkeypatch.setattr(h200, "Clock", lambda device: h200_measures.Clock("cuda"))
    monkeypatch.setattr(h200_measures, "bench", lambda call, **options: (call(), 2.0)[1])
    for name in ("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: next(memory))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", nothing)

    def measured(name: str) -> dict[str, Any]:
        torch.compiler.reset()
        (row,) = [row for row in rows() if row.name == name]
        return h200.measure(row, Pretended(dry=False), True, {"C": 1e-6, "G": 1e-6}, 2)

    return measured


OWN = {"error", "repeatable", "no host sync", "captured"}
CHECKS = {
    "norm 4096 fwd": {"0.94 C", "quack", "Liger", "F.rms_norm", "compile"},
    "norm 16384 bwd": {"0.82 C", "quack", "Liger", "F.rms_norm", "compile"},
    "add and norm 8192 fwd+bwd": {"Liger", "quack", "compile"},
    "norm 8192 groups of 64 fwd+bwd": {"mamba_ssm", "full row", "compile"},
    "rotation packed bwd": {"0.9 C", "Liger", "own fwd", "compile"},
    "embedding shard bwd": {"0.5 C", "Megatron's operations"},
    "cross-entropy 16384 fwd+bwd": {"0.9 C", "1 collective", "memory <= 0.0 MiB", "Liger", "TE", "flash-attn"},
    "cross-entropy 131072 fwd": {
        *("0.92 C", "1 collective", "memory <= 0.0 MiB", "Liger", "TE", "flash-attn", "compile")
    },
    "head and loss 128256 fwd+bwd": {
        *("<= 18.3 ms", "memory <= 0.0 MiB", "Liger", "recomputed in blocks", "apart", "plain torch")
    },
    "head and loss 16384 fwd+bwd": {
        *("0.9 G", "memory <= 0.0 MiB", "Liger", "recomputed in blocks", "apart", "plain torch")
    },
    "swiglu 3584 packed bwd": {"0.93 C", "Liger"},
    "swiglu 3584 packed fwd+bwd": {"Liger", "compile"},
    "swiglu 3584 apart bwd": {"Liger"},
    "block of 8B at tp 1 fwd+bwd": {"gaps <= 3 us"},
    "compiled: block of 8B at tp 1 fwd+bwd": {"plain", "eager"},
    "compiled: cross-entropy 16384 fwd+bwd": {"eager"},
}


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("name", CHECKS)
def test_what_is_checked_on_a_gpu(name: str, pretended: Callable[[str], dict[str, Any]]) -> None:
    found = pretended(name)
    own = OWN - {"repeatable"} if "block" in name else OWN
    assert set(found["checks"]) == own | CHECKS[name]
    rounded_twice = "swiglu" in name  # where no kernel serves it
    assert found["checks"]["error"] == ("miss" if rounded_twice else "pass") and found["ms"]["ours"] == 2.0
    assert all(found["ratios"][other] == 1.0 for other in ("compile", "full row", "own fwd") if other in CHECKS[name])


def test_verdicts_on_a_gpu_whose_every_call_takes_2_ms(pretended: Callable[[str], dict[str, Any]]) -> None:
    head = pretended("head and loss 128256 fwd+bwd")["checks"]
    assert head["<= 18.3 ms"] == "pass" and head["recomputed in blocks"] == "1.00x"
    assert head["memory <= 0.0 MiB"] == "miss"  # of which each look at the memory finds one more MiB
    head = pretended("head and loss 16384 fwd+bwd")
    assert head["checks"]["recomputed in blocks"] == "1.00x miss (bar 1.25)" and head["checks"]["0.9 G"] == "pass"
    assert head["of G"] == pytest.approx(6 * 4 * 64 * 64 / 2e-3 / 1e12 / 1e-6)
    groups = pretended("norm 8192 groups of 64 fwd+bwd")["checks"]
    assert groups["full row"] == "1.00x pass (bar 0.93)" and groups["compile"] == "1.00x miss (bar 1.5)"
    turns = pretended("rotation packed bwd")["checks"]
    assert turns["own fwd"] == "1.00x pass (bar 0.97)"
    traced = pretended("compiled: swiglu 14336 fwd+bwd")["checks"]
    assert traced["eager"] == "1.00x pass (bar 0.97)"


def test_a_peer_that_waits_for_the_gpu_is_compared_with_our_calls_from_the_host(
    pretended: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short calls, of which those of the second contender cannot be replayed."""
    waits = iter(["", "failed: a sync"])
    monkeypatch.setattr(h200_measures, "SHORT_MS", 3.0)
    monkeypatch.setattr(h200_measures, "host_sync", lambda call: next(waits))
    found = pretended("embedding shard fwd")
    assert found["timed by"] == {
        "ours": "graph",
        "Megatron's operations": "calls from the host",
        "ours, from the host": "calls from the host",
    }
    assert found["ms"]["ours"] == 0.1 and found["ratios"] == {"Megatron's operations": 1.0}


def test_the_host_row_on_a_gpu(pretended: Callable[[str], dict[str, Any]]) -> None:
    found = pretended("host time, norm 128 x 4096 fwd+bwd")
    assert set(found["checks"]) == OWN - {"captured"} | {"Liger", "F.rms_norm", "quack"}
    assert found["timed by"] == {"ours": "host", "F.rms_norm": "host"}


def test_verdicts() -> None:
    assert h200.versus([1.0, 1.1], [3.4, 3.5], 3.0) == "3.29x pass (bar 3)"
    assert h200.versus([1.0, 1.1], [2.0, 2.1], 3.0) == "1.95x miss (bar 3)"
    assert h200.versus([1.0, 1.1], [3.0, 3.2], 3.0) == "2.95x tie (bar 3)"
    assert h200.versus([1.0], [2.0], None) == "2.00x"


def test_verdicts_on_the_rows_of_a_bar_together() -> None:
    entries = [{"bar": 1, "ratios": {"Liger": 2.0}}, {"bar": 1, "ratios": {"Liger": 0.5}}, {"bar": 2, "result": "no"}]
    assert h200.geomeans(entries) == [
        {"bar": 1, "row": "geometric means", "checks": {"Liger": "1.00x miss (bar 1.03, 2 rows)"}}
    ]


def test_gaps_between_kernels() -> None:
    assert h200_facts.gaps([(10, 12), (0, 4), (1, 2), (4, 8.5)]) == [1.5]
    assert h200_facts.gaps([]) == []


def case(ours: Call, body: Call, *leaves: Tensor, **options: Any) -> Case:
    return Case(ours, body, list(leaves), options.pop("mode", "fwd+bwd"), {}, **options)


def test_verdicts_on_what_was_found_out() -> None:
    facts = {"repeatable": False, "host sync": "failed: a sync", "peak MiB": 3.0, "graph": "failed: x"}
    options: dict[str, Any] = {"memory": 2.0 * 2**20, "gap_us": 3.0, "proofs": {"even": lambda: False}}
    found = h200_facts.verdicts(case(abs, abs, **options), facts | {"kernels": 3, "gaps us": [3.5, 0.1]})
    assert found.pop("captured") == "miss: failed: x" and set(found.values()) == {"miss"} and len(found) == 5
    unseen = h200_facts.verdicts(case(abs, abs, gap_us=3.0), facts | {"kernels": 0, "gaps us": []})
    assert unseen["gaps <= 3 us"].startswith("not measured")


def test_errors_are_those_of_the_body_rounded_alike() -> None:
    """Strides are kept, fresh memory is NaN, a wrong gradient counts, and a peer that fails is named."""
    torch.manual_seed(0)
    x = torch.randn(64, 2, 32, dtype=torch.bfloat16)[:, 0]

    def body(x: Tensor) -> Tensor:
        return (x.double() if x.dtype == torch.float64 else x.float()).exp().to(x.dtype)

    def strided(x: Tensor) -> Tensor:
        assert x.stride() == (64, 1)
        return body(x)

    def failing(x: Tensor) -> Tensor:
        raise ValueError("no")

    calls: dict[str, Call] = {
        "ours": strided,
        "fresh": lambda x: body(x) + torch.empty(1, dtype=x.dtype),
        "value": lambda x: body(x) + 0.5,
        "gradient": lambda x: body(x) + 0.1 * (x - x.detach()),
        "failing": failing,
    }
    found = h200_measures.errors(case(strided, body, x), calls)
    assert found["ours"] == 1.0 and found["fresh"] != found["fresh"]
    assert found["value"] > 2 and found["gradient"] > 2  # type: ignore[operator]
    assert found["failing"] == "failed: ValueError: no"
    assert not torch.are_deterministic_algorithms_enabled()


def test_rows_that_fail_are_reported_and_the_next_one_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    measured: list[str] = []

    def measure(row: Row, *arguments: Any) -> dict[str, Any]:
        measured.append(row.name)
        if len(measured) == 1:
            raise RuntimeError("no memory")
        return {"bar": row.bar, "row": row.name, "ms": {"ours": 1.0}, "ratios": {"Liger": 2.0}, "checks": {}}

    monkeypatch.setattr(h200, "measure", measure)
    chosen = [row for row in rows() if row.bar == 1][:3]
    options = h200.parsed(["--out", str(out), "--part", "2"])
    h200.run_rows(chosen, Pretended(dry=False), options, {})
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert measured == [row.name for row in chosen]
    assert found[0]["result"] == "failed: RuntimeError: no memory" and found[1]["ms"] == {"ours": 1.0}
    assert found[3]["checks"] == {"Liger": "2.00x pass (bar 1.03, 2 rows)"}
    options.seconds = -1
    h200.run_rows(chosen[:1], Pretended(dry=False), options, {})
    assert json.loads(out.read_text().splitlines()[-1])["result"] == "not measured: no time left"


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","_forward","dram__bytes_read.sum","byte","1,000"
"0","7","_forward","dram__bytes_write.sum","byte","500"
"1","7","reduce, sum","launch__registers_per_thread","register/thread","32"
"""


def test_counters_of_the_worst_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert h200_counters.kernels(NCU) == [
        {"kernel": "_forward", "read": 1000.0, "written": 500.0},
        {"kernel": "reduce, sum", "registers": 32.0},
    ]
    shares = {"a": 0.9, "b": 0.2, "c": 0.5}
    path = tmp_path / "rows.jsonl"
    for name, share in [("b", 0.95), *shares.items()]:
        h200.write(path, {"row": name, "of C": share, "work": {"C": 1000}})
    tool = tmp_path / "ncu"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{NCU}END\n")
    tool.chmod(0o755)
    for found in (None, str(tool)):
        monkeypatch.setattr("shutil.which", lambda name, found=found: found)
        h200_counters.main([str(path), "--count", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"{'b':44}  20.0% C  not measured: found no ncu",
        f"{'c':44}  50.0% C  not measured: found no ncu",
    ]
    assert lines[2].startswith("b ") and lines[3].strip() == "_forward, read 1,000, written 500"
    assert lines[5].strip() == "1.50 times the least bytes"
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["row"] for row in written[4:]] == ["b", "c", "b", "c"] and len(written[-1]["kernels"]) == 2
