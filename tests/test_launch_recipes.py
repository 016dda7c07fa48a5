"""The recipes in launch/ for several machines, as two launchers on this one: the digest is that of one process."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
JOB = "--data README.md --vocab-size 300 --layers 1 --dim 32 --seq-len 16 --batch-size 2 --new-tokens 1 --steps 4"
JOB += " --num-shards 4 --device cpu"
# Stand-ins for SLURM on two nodes: srun starts its command once for each of them, side by side.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait "$first" && wait "$second"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$1 $2" == "show hostnames" && -n $3 ]] && echo localhost
"""


def start(folder: Path, *command: str, **settings: str) -> subprocess.Popen[str]:
    paths = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": paths, "OMP_NUM_THREADS": "1", **settings}
    job = [*JOB.split(), "--cache", str(folder / "cache"), "--out", str(folder / "run")]
    return subprocess.Popen(
        [*command, *job], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def digests(*processes: subprocess.Popen[str]) -> list[str]:
    """All digests that were printed; every process must end well."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err
            found += re.findall("^digest ([0-9a-f]{64}) threads 1$", out, re.MULTILINE)
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The digest of one process, without a launcher."""
    found = digests(start(tmp_path_factory.mktemp("one"), sys.executable, "-m", "scripts.train"))
    assert len(found) == 1
    return found


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("numbered", [False, True], ids=["c10d", "static"])
def test_multinode(tmp_path: Path, reference: list[str], port: int, numbered: bool) -> None:
    settings = {"HEAD": f"localhost:{port}", "NNODES": "2", "NPROC_PER_NODE": "1", "MAX_RESTARTS": "1"}
    own: list[dict[str, str]] = [{"NODE_RANK": "0"}, {"NODE_RANK": "1"}] if numbered else [{}, {}]
    launchers = [start(tmp_path, "bash", "launch/multinode.sh", **settings, **extra) for extra in own]
    assert digests(*launchers) == reference


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.mark.slow
def test_slurm_with_a_launcher_per_node(tmp_path: Path, reference: list[str], port: int) -> None:
    stand_in(tmp_path, "srun", SRUN)
    stand_in(tmp_path, "scontrol", SCONTROL)
    settings = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": str(port)}
    settings |= {"SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "1", "NPROC_PER_NODE": "2"}
    assert digests(start(tmp_path, "bash", "launch/slurm.sbatch", **settings)) == reference


@pytest.mark.slow
def test_slurm_with_a_task_per_rank(tmp_path: Path, reference: list[str], port: int) -> None:
    stand_in(tmp_path, "scontrol", SCONTROL)
    settings = {"SLURM_STEP_NODELIST": "node0", "SLURM_STEP_TASKS_PER_NODE": "2(x1)", "SLURM_STEP_NUM_TASKS": "2"}
    settings |= {"SLURM_JOB_ID": str(port)}
    tasks = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]
    command = ["bash", "launch/slurm_task.sh"]
    assert digests(*(start(tmp_path, *command, **settings, **task) for task in tasks)) == reference


@pytest.mark.parametrize("recipe", ["slurm.sbatch", "slurm_task.sh"])
def test_nodes_that_slurm_does_not_name(tmp_path: Path, recipe: str) -> None:
    stand_in(tmp_path, "scontrol", "#!/usr/bin/env bash\nexit 1\n")
    settings = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_STEP_NODELIST": "node[0-1]"}
    settings |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    process = start(tmp_path, "bash", f"launch/{recipe}", SLURM_STEP_TASKS_PER_NODE="1(x2)", **settings)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "scontrol show hostnames node[0-1] named no node" in err


@pytest.mark.slow
def test_processes_that_srun_started_without_a_recipe_are_refused(tmp_path: Path) -> None:
    task = start(tmp_path, sys.executable, "-m", "scripts.train", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1")
    _, err = task.communicate(timeout=60)
    assert task.returncode == 1 and err.startswith("error: srun started 2 tasks, but RANK is not set")
