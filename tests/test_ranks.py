"""scripts.ranks: how scripts start their ranks, and that they end with one sentence, said once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.ranks import INSTALL, one_sentence, run_ranks
from src import Group, SimulationError

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

WITHOUT = """
import runpy, sys

class Without:
    @staticmethod
    def find_spec(name, *_):
        if name == {missing!r}:
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Without)
sys.argv[1:] = {arguments!r}
runpy.run_module("scripts.{script}", run_name="__main__")
"""


@pytest.mark.parametrize(
    "missing, script, arguments",
    [
        ("torch", "train", []),
        ("torch", "generate", ["--model", "there", "--prompt", "once"]),
        ("torch", "convert", ["there", "here", "--to", "meta"]),
        ("torch", "verify", []),
        ("torch", "plan", ["--model", "llama3-8b"]),
        ("numpy", "train", []),
    ],
)
def test_without_torch_or_numpy(missing: str, script: str, arguments: list[str]) -> None:
    program = WITHOUT.format(missing=missing, arguments=arguments, script=script)
    command = [sys.executable, "-W", "ignore", "-c", program]  # torch itself warns where numpy is missing
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"error: {missing} is not installed; {INSTALL}\n")


def torchrun(*arguments: str) -> str:
    """What two processes, which fail, say on standard error."""
    done = subprocess.run([*TORCHRUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.slow
def test_one_rank_speaks_for_all(tmp_path: Path) -> None:
    said = torchrun("-m", "scripts.train", "--data", "no/such/file", "--out", str(tmp_path), "--cache", str(tmp_path))
    assert said.count("error: found no text in data=no/such/file: pass a text file") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "option, sentence",
    [
        pytest.param(
            ["--device", "cuda"],
            "error: device=cuda: 2 ranks on this machine need as many GPUs",
            marks=pytest.mark.skipif(torch.cuda.device_count() > 1, reason="two GPUs are no mistake"),
        ),
        (["--simulate", "2"], "error: --simulate runs all ranks in one process; start it without torchrun"),
        (["--steps", "0"], "error: --steps must be at least 1, not 0"),
    ],
    ids=["before ranks meet", "before torch is used", "command line"],
)
def test_one_rank_speaks_early_too(option: list[str], sentence: str) -> None:
    assert torchrun("-m", "scripts.train", *option).count(sentence) == 1


ONE_BY_ONE = """
from scripts.ranks import one_sentence, run_ranks

def program(group, options):
    raise ValueError(f"rank {group.rank} has a reason of its own")

with one_sentence():
    run_ranks(program, None, device="cpu")
"""


@pytest.mark.slow
def test_ranks_with_other_reasons_all_speak(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{ONE_BY_ONE}")
    said = torchrun(str(tmp_path / "script.py"))
    assert [said.count(f"error: rank {rank} has a reason of its own\n") for rank in (0, 1)] == [1, 1]


def test_the_sentence_is_one_write() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "scripts.convert", "no/such/place", "here", "--to", "meta"]
    assert subprocess.run(command, cwd=ROOT, stderr=theirs).returncode == 1
    theirs.close()
    with ours:
        assert ours.recv(1000) == b"error: no/such/place does not exist; names on the Hub are not downloaded\n"


def refuse(group: Group, error: Exception) -> None:
    raise error


def test_what_is_no_mistake_of_the_user_keeps_its_traceback() -> None:
    with pytest.raises(SystemExit, match="error: mine"), one_sentence():
        run_ranks(refuse, ValueError("mine"), simulated=2)
    for error in (TypeError("a bug"), RuntimeError("a bug")):
        with pytest.raises(type(error), match="a bug"), one_sentence():
            run_ranks(refuse, error)
        with pytest.raises(SimulationError, match="a bug"), one_sentence():
            run_ranks(refuse, error, simulated=2)
    assert "RANK" not in os.environ
