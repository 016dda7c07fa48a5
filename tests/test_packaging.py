"""The wheel and the editable install import as ``isoshard``, with every sub-package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USE = """
import importlib.util, pathlib, isoshard, isoshard.modeling, isoshard.testing, isoshard.training, isoshard.checkpoint
from isoshard.functional import apply_rotary_pos_emb
from isoshard.modeling import GroupRMSNorm, NTKAwareRoPE, ParallelVocabEmbedding, VocabEmbedding
def program(group):
    return ParallelVocabEmbedding(8, 4, process_group=group).weight.shape
assert isoshard.simulate(program, 2)[1] == (4, 4)
print(importlib.util.find_spec("src"), pathlib.Path(isoshard.__file__).parent)
"""


def run(folder: Path, *command: str, **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    run(tmp_path, *build)
    (wheel,) = tmp_path.glob("isoshard-*.whl")
    target = tmp_path / "installed"
    run(tmp_path, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel))
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".dist-info") == ["bin", "isoshard"]
    found = {path.relative_to(target / "isoshard") for path in (target / "isoshard").rglob("*.py")}
    assert found == {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*.py")}
    assert (target / "isoshard" / "py.typed").exists()
    assert run(tmp_path, "-c", USE, PYTHONPATH=str(target)) == f"None {target / 'isoshard'}"
    shown = run(tmp_path, "-m", "pytest", "--trace-config", "--version", "--version", PYTHONPATH=str(target))
    assert re.search(rf"isoshard-\S+ at {target}/isoshard/testing.py", shown)


@pytest.mark.skipif(find_spec("isoshard") is None, reason="isoshard is not installed here; scripts/test.sh does it")
def test_editable_install(tmp_path: Path) -> None:
    assert run(tmp_path, "-c", USE) == f"None {ROOT / 'src'}"


def test_imports_leave_dtensor_and_dynamo_alone() -> None:
    program = "import sys, src, src.distributed, src.modeling, src.training, src.functional, src.tensor_parallel\n"
    run(ROOT, "-c", program + "assert not {'torch.distributed.tensor', 'torch._dynamo'} & sys.modules.keys()")
