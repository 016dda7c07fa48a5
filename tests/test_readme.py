"""The README's examples do what the README says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN, SIMULATED, TESTS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "isoshard").symlink_to(ROOT / "src", target_is_directory=True)
    return tmp_path


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, env=environment, timeout=120
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_torchrun_example(folder: Path) -> None:
    (folder / "tp.py").write_text(TORCHRUN)
    shown = run(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tp.py")
    losses = re.findall(r"rank (\d) of 2: weight \[128, 64\], loss (\d\.\d+)", shown)
    assert sorted(rank for rank, _ in losses) == ["0", "1"]
    assert len({loss for _, loss in losses}) == 1
    assert "rank 0 of 1: weight [256, 64]" in run(folder, "tp.py")


def test_simulation_example(folder: Path) -> None:
    shown = run(folder, "-c", SIMULATED)
    sizes = {int(size): ast.literal_eval(losses) for size, losses in re.findall(r"(\d) (\[.*\])", shown)}
    assert [len(losses) for losses in sizes.values()] == list(sizes) == [1, 2, 4, 8]
    assert len({loss for losses in sizes.values() for loss in losses}) == 1


def test_pytest_example(folder: Path) -> None:
    (folder / "test_example.py").write_text(TESTS)
    assert "3 passed" in run(folder, "-m", "pytest", "-p", "no:cacheprovider", "test_example.py")
