"""A real rank fails: the others end soon, name it, and a restarted job goes on from the last checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from src import Group
from src.distributed import long_wait
from src.distributed.failure import timeout_of
from src.testing import Ranks

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "isoshard", "run"]
TINY = ["--data", "README.md", "--vocab-size", "300", "--layers", "1", "--dim", "32", "--seq-len", "16"]
TINY += ["--batch-size", "2", "--new-tokens", "1"]


def launch(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*LAUNCH, *args], cwd=cwd, env=environ, capture_output=True, text=True, timeout=170)


@pytest.mark.parametrize(
    "fate", ["killed", pytest.param("raises", marks=pytest.mark.slow), pytest.param("stalls", marks=pytest.mark.slow)]
)
def test_the_missing_rank_is_named(fate: str) -> None:
    done = launch("--nproc-per-node", "3", "--timeout", "3", "tests/launched/fails.py", fate)
    assert done.returncode == 1
    line = (
        (ROOT / "tests/launched/fails.py")
        .read_text()
        .split("\n")
        .index("        all_reduce(torch.ones(4), group=group)")
    )
    call = rf"all_reduce\(float32\[4\]\) forward, at \S*fails.py:{line + 1}"
    sentence = rf"{call}: failed in the group of ranks \[0, 1, 2\]: rank 1 "
    for rank in (0, 2):
        assert re.search(rf"^\[rank{rank}\]: .*RankFailure: {sentence}", done.stderr, re.MULTILINE), done.stderr
    waits = [float(seconds) for seconds in re.findall(r"ended after (\S+) s", done.stdout)]
    assert len(waits) == 2 and max(waits) < 10


def timeout(group: Group) -> float:
    return timeout_of(group.pg).total_seconds()


def waits(group: Group) -> list[float]:
    """Seconds inside a long wait and after it; no name of torch that warns is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with long_wait(group, 77):
            inside = timeout(group)
        return [inside, timeout(group)]


def test_a_long_wait_ends(ranks: Ranks) -> None:
    before = ranks.on("gloo", 2)(timeout)
    assert ranks.on("gloo", 2)(waits) == [[77, seconds] for seconds in before] and 77 not in before


@pytest.mark.parametrize("options", [[], ["--check"]], ids=["plain", "checked"])
@pytest.mark.slow
def test_the_missing_rank_of_a_sum_that_was_started_is_named(options: list[str]) -> None:
    done = launch("--nproc-per-node", "3", "--timeout", "3", *options, "tests/launched/fails_in_flight.py")
    assert done.returncode == 1
    lines = (ROOT / "tests/launched/fails_in_flight.py").read_text().split("\n")
    place = rf"backward, at \S*fails_in_flight.py:{lines.index('        y.backward()') + 1}"
    for rank in (0, 2):
        if options:
            sentence = rf"rank 1 did not come to all_reduce\(SUM, float32\[1024, 512\]\) .*{place}"
        else:
            sentence = rf"all_reduce\(float32\[1024, 512\]\) {place}: failed in the group of ranks \[0, 1, 2\]: rank 1 "
        assert re.search(rf"^\[rank{rank}\]: .*{sentence}", done.stderr, re.MULTILINE), done.stderr
    waits = [float(seconds) for seconds in re.findall(r"ended after (\S+) s", done.stdout)]
    assert len(waits) == 2 and max(waits) < 10


@pytest.mark.slow
def test_a_restarted_job_ends_with_the_same_digest(tmp_path: Path) -> None:
    job = [
        *TINY,
        "--steps",
        "60",
        "--save-every",
        "20",
        "--eval-every",
        "60",
        "--num-shards",
        "2",
        "--cache",
        str(tmp_path),
    ]
    whole = launch("--nproc-per-node", "2", "-m", "scripts.train", *job, "--out", str(tmp_path / "whole"))
    restarts = ["--nproc-per-node", "2", "--max-restarts", "1"]
    died = launch(*restarts, "tests/launched/dies_once.py", *job, "--resume", "--out", str(tmp_path / "died"))
    assert (whole.returncode, died.returncode) == (0, 0), whole.stderr + died.stderr
    assert "continuing from step" in died.stdout
    digests = [re.findall("^digest ([0-9a-f]{64})", run.stdout, re.MULTILINE) for run in (whole, died)]
    assert len(digests[0]) == 1 and digests[0] == digests[1]
