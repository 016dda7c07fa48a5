"""Broken programs: each is found out, with the ranks and lines at fault, and none hangs. Correct ones run through.

A broken program is a file of ``faults/``: ``program(group)`` runs on RANKS ranks, and the message must contain SAYS
(the first text is its kind), MODULE where that is given, and for each comment ``# named: ranks 0, 2-3`` a statement
about exactly these ranks at that line, in the given phase where the comment goes on with forward or backward.
REAL is True, or the reason why the program is no fault among real processes or cannot be seen there; SAYS_REAL are the
texts where they differ; lines with ``simulated`` are named by simulation only. ORDER tells why a message depends on
the order in which the ranks run.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from src import Group, SimulationError, init, simulate
from src.rank_runs import time_limit
from src.testing import RankPool

from .correct_programs import CORRECT

FAULTS = sorted(path.stem for path in (Path(__file__).parent / "faults").glob("[a-z]*.py"))
KINDS = {
    *("op", "shape", "dtype", "reduce-op", "root", "group", "splits", "order", "message", "polling"),
    *("early return", "exception", "missing rank", "deadlock cycle", "foreign thread", "read before wait"),
    *("branch", "loop length", "data parallel", "optimizer"),
}
SECONDS = 5.0
STATEMENTS = (
    r"^\s*ranks? (\d[\d, -]*)(:| raised| returned| waits)",
    r"; rank (\d+)( was running)$",
    r" what rank (\d+)( waits for| sends) in ",
)
"""A line of a message says something about these ranks."""

pytestmark = [
    pytest.mark.usefixtures("left_as_found"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@dataclass(frozen=True)
class Named:
    """What a comment in a program asks of the message."""

    site: str
    ranks: frozenset[int]
    words: tuple[str, ...]

    def found_in(self, text: str) -> bool:
        """Whether all statements of one kind about this line are together about exactly these ranks."""
        phase = next((f" {word}, at " for word in self.words if word in ("forward", "backward")), " at ")
        ranks: dict[tuple[str, int], set[int]] = {}
        for number, part in enumerate(text.split("\nbefore, they were in\n")):
            for line in part.splitlines():
                if re.search(re.escape(phase + self.site) + r"(?!\d)", line):
                    for numbers, statement in (found for pattern in STATEMENTS for found in re.findall(pattern, line)):
                        ranks.setdefault((statement, number), set()).update(rank_numbers(numbers))
        return self.ranks in ranks.values()


@dataclass(frozen=True)
class Fault:
    """A file of ``faults/``."""

    program: Callable[[Group], Any]
    kind: str
    ranks: int
    says: tuple[str, ...]
    says_real: tuple[str, ...]
    module: str | None
    real: bool | str
    order: str | None
    named: tuple[Named, ...]

    def missing(self, text: str, *, says: tuple[str, ...], simulated: bool) -> list[str | Named]:
        """What a message ought to contain but does not."""
        named = [line for line in self.named if simulated or "simulated" not in line.words]
        module = [] if self.module is None else [f" {self.module}, "]
        return [*(t for t in (*says, *module) if t not in text), *(line for line in named if not line.found_in(text))]


def rank_numbers(text: str) -> frozenset[int]:
    """``0, 2-4`` as numbers."""
    ends = [list(map(int, part.split("-"))) for part in text.split(",")]
    return frozenset(rank for run in ends for rank in range(run[0], run[-1] + 1))


def load(name: str) -> Fault:
    """The program of ``faults/name.py`` and what is expected of its message."""
    module: Any = importlib.import_module(f"tests.faults.{name}")
    named = []
    for number, line in enumerate(Path(module.__file__).read_text().splitlines(), 1):
        comment = re.search(r"# named: ranks? (\d[\d, -]*?)((?:, [a-z]+)*)$", line)
        assert comment is not None or "# named" not in line, f"{name}.py:{number} is not understood"
        if comment is not None:
            words = tuple(comment[2].split(", ")[1:])
            named.append(Named(f"{module.__file__}:{number}", rank_numbers(comment[1]), words))
    says = texts(module.SAYS)
    return Fault(
        module.program, module.KIND, module.RANKS, says, texts(getattr(module, "SAYS_REAL", says)),
        getattr(module, "MODULE", None), module.REAL, getattr(module, "ORDER", None), tuple(named),
    )  # fmt: skip


def texts(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def message(fault: Fault, schedule_seed: int | None = None) -> str:
    """What simulation says about a broken program."""
    with time_limit(SECONDS, "the simulation"), pytest.raises(SimulationError) as error:
        simulate(fault.program, fault.ranks, schedule_seed=schedule_seed)
    return str(error.value)


@pytest.mark.parametrize("name", FAULTS)
def test_simulation_names_ranks_and_lines(name: str) -> None:
    fault = load(name)
    text = message(fault)
    assert not fault.missing(text, says=fault.says, simulated=True), text


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_found_in_any_order_of_the_ranks(name: str, seed: int) -> None:
    fault = load(name)
    text = message(fault, schedule_seed=seed)
    assert fault.says[0] in text, text
    assert fault.order or not fault.missing(text, says=fault.says, simulated=True), text


def test_the_programs_cover_what_can_go_wrong() -> None:
    faults = {name: load(name) for name in FAULTS}
    assert len(faults) >= 30
    assert {fault.kind for fault in faults.values()} == KINDS
    assert {fault.ranks for fault in faults.values()} == set(range(2, 9))
    for phase in ("forward", "backward"):
        assert any(phase in line.words for fault in faults.values() for line in fault.named)
    for name, fault in faults.items():
        assert fault.named, f"{name}.py names no line"
        length = len((Path(__file__).parent / "faults" / f"{name}.py").read_text().splitlines())
        assert 10 <= length <= 38, f"{name}.py has {length} lines"


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("program, ranks", CORRECT)
def test_correct_programs_are_not_reported(program: Callable[[Group], Any], ranks: int, seed: int | None) -> None:
    with time_limit(SECONDS, "the simulation"):
        simulate(program, ranks, schedule_seed=seed)


@pytest.fixture(scope="module")
def processes() -> Iterator[RankPool]:
    """Four processes, apart from those of other tests: broken programs may leave them in any state."""
    pool = RankPool("gloo", 4, timeout=15)
    yield pool
    pool.close()


def checked(group: Group, program: Callable[[Group], Any], ranks: int, port: int) -> str | None:
    """What one real process is told about a program that runs on the first ``ranks`` processes; None: nothing."""
    rank = int(os.environ.setdefault("RANK_IN_POOL", str(group.rank)))
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank >= ranks:
        return None
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    group = init(device="cpu", check=True, timeout=timedelta(seconds=2))
    try:
        program(group)
    except BaseException as error:
        return f"{type(error).__name__}\n{error}"
    return None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def real_faults() -> Iterator[Any]:
    """Programs for processes; most of those that take until the timeout are slow tests."""
    quick = {"early return", "deadlock cycle", "message"}
    for name in FAULTS:
        fault = load(name)
        if fault.real is True and fault.ranks <= 4:
            waits = "did not" in fault.says_real[0]
            yield pytest.param(name, marks=[pytest.mark.slow] if waits and fault.kind not in quick else [])
            quick -= {fault.kind} if waits else set()


@pytest.mark.parametrize("name", list(real_faults()))
def test_checked_processes_name_ranks_and_lines(processes: RankPool, name: str) -> None:
    fault = load(name)
    told = processes.run(checked, fault.program, fault.ranks, free_port())[: fault.ranks]
    report = "\n".join(f"process {rank} was told {text}" for rank, text in enumerate(told))
    assert any(text and not fault.missing(text, says=fault.says_real, simulated=False) for text in told), report
    if any(text and re.match(r"CheckError\n(mismatched|collectives in different order)", text) for text in told):
        assert len(set(told)) == 1, report


@pytest.mark.parametrize("program, ranks", [case for case in CORRECT if case.values[1] <= 4])
def test_checked_processes_run_correct_programs(
    processes: RankPool, program: Callable[[Group], Any], ranks: int
) -> None:
    assert processes.run(checked, program, ranks, free_port()) == [None] * 4
