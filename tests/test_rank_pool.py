"""Worker processes: how long they live, and what is said when one fails, hangs or dies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from src import Group
from src.testing import RankFailed, RankPool

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def one() -> Iterator[RankPool]:
    pool = RankPool("gloo", 1, timeout=60)
    yield pool
    pool.close()


def fail_on_one(group: Group, number: int) -> None:
    if group.rank == 1:
        raise LookupError(f"number {number}")
    dist.barrier()


def process(group: Group) -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def sleep_on_one(group: Group) -> None:
    time.sleep(60 * group.rank)


def test_processes_stay_until_one_fails_or_hangs() -> None:
    pool = RankPool("gloo", 2, timeout=60)
    try:
        first = pool.run(process)
        assert first == pool.run(process) and [threads for _, threads in first] == [1, 1]
        assert len({*first, (os.getpid(), 1)}) == 3
        with pytest.raises(
            RankFailed, match=r"(?s)rank 1 of 2 \(gloo\) failed:.*in fail_on_one.*LookupError: number 17"
        ):
            pool.run(fail_on_one, 17)
        second = pool.run(process)
        assert not {*first} & {*second} and not any(is_alive(process) for process, _ in first)
        pool.timeout = 0.5
        stack = (
            r'ranks \[1\] of 2 \(gloo\) did not answer within 0.5 s\nrank 1:\n  File ".*", line \d+ in sleep_on_one$'
        )
        with pytest.raises(TimeoutError, match=stack):
            pool.run(sleep_on_one)
        assert not any(is_alive(process) for process, _ in second)
    finally:
        pool.close()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_that_do_not_even_start_are_named() -> None:
    pool = RankPool("gloo", 2, start_timeout=0.05)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 \(gloo\) did not start within 0.05 s"):
        pool.run(process)


def end_process(group: Group) -> None:
    os._exit(3)


def end_process_soon(group: Group) -> None:
    threading.Timer(0.1, os._exit, [3]).start()


def unpicklable(group: Group) -> Group:
    return group


def test_processes_that_die_and_results_that_cannot_be_sent(one: RankPool) -> None:
    one.run(end_process_soon)
    time.sleep(0.3)
    for program in (process, end_process):
        with pytest.raises(RankFailed, match=r"rank 0 of 1 \(gloo\) failed:\nits process ended with exit code 3"):
            one.run(program)
    with pytest.raises(RankFailed, match=r"(?s)rank 0 of 1 \(gloo\) failed:.*a Group .* cannot be pickled"):
        one.run(unpicklable)


ORPHAN = """
import time
from src.testing import RankPool

def hang(group):
    print("started", flush=True)
    time.sleep(300)

if __name__ == "__main__":
    RankPool("gloo", 1).run(hang)
"""


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "orphan.py").write_text(ORPHAN)
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "orphan.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
    parent.kill()
    parent.communicate(timeout=20)  # ends when the last process that has the pipe does
