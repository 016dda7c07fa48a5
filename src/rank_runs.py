"""A program on the ranks of one place, simulated or real: its results, or the failing rank's own traceback."""

from __future__ import annotations

import logging
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from .rank_pool import RankFailed, RankPool

BACKENDS = ("simulated", "gloo", "nccl")


@dataclass(frozen=True)
class Ranks:
    """``ranks(program, *args, **group_options)``: ``program(group, *args)`` on every rank; results in rank order.

    ``backend`` is "simulated", "gloo" or "nccl"; ``group_options`` are those of ``Group``. Processes are those of the
    test run, and a program for them must be importable (a function at module level).

    Raises RankFailed with the traceback of the lowest rank that failed, SimulationError where simulated ranks do not
    fit together, TimeoutError with the stacks of the ranks that did not end within ``timeout`` seconds, and skips the
    test where GPUs are missing.
    """

    backend: str
    world_size: int
    test: str = field(repr=False)
    timeout: float = field(repr=False)
    style: str = field(repr=False)
    pool: Callable[[str, int], RankPool] = field(repr=False)
    group_options: Mapping[str, Any] = field(repr=False)

    def on(self, backend: str, world_size: int) -> Ranks:
        """The same for another place. Raises ValueError for an unknown ``backend``."""
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
        return replace(self, backend=backend, world_size=world_size)

    def __call__(self, program: Callable[..., Any], *args: Any, **group_options: Any) -> list[Any]:
        import pytest

        __tracebackhide__ = True
        if not self.backend:
            raise ValueError("ranks(...) needs @pytest.mark.ranks(...) on the test, or ranks.on(backend, world_size)")
        if reason := missing_gpus(self.backend, self.world_size):
            pytest.skip(reason)
        run = self._simulate if self.backend == "simulated" else self._run_in_processes
        try:
            return run(described, (self.backend, self.style, program, args), {**self.group_options, **group_options})
        except RankFailed as error:
            if error.outcome == "skipped":
                raise pytest.skip.Exception(error.text, _use_item_location=True) from None
            if error.outcome == "xfailed":
                raise pytest.xfail.Exception(error.text) from None
            raise RankFailed(*error.args) from None  # whose traceback is that of the caller

    def _simulate(self, program: Callable[..., Any], args: Any, group_options: Any) -> list[Any]:
        from .distributed import SimulationError, simulate

        __tracebackhide__ = True
        try:
            with time_limit(self.timeout, f"{self.test}: {self.world_size} ranks (simulated)"), quiet_torch():
                return simulate(program, self.world_size, *args, **group_options)
        except (SimulationError, TimeoutError) as error:
            fault = error.__cause__ if isinstance(error.__cause__, RankFailed) else error
            raise type(fault)(*fault.args) from None

    def _run_in_processes(self, program: Callable[..., Any], args: Any, group_options: Any) -> list[Any]:
        __tracebackhide__ = True
        pool = self.pool(self.backend, self.world_size)
        pool.timeout = self.timeout
        try:
            return pool.run(program, *args, **group_options)
        except TimeoutError as error:
            raise TimeoutError(f"{self.test}: {error}") from None


def missing_gpus(backend: str, world_size: int) -> str:
    """Why ``world_size`` ranks of ``backend`` cannot run on this machine; empty if they can."""
    if backend != "nccl":
        return ""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"needs {world_size} GPUs, found {found}" if found < world_size else ""


def described(group: Any, backend: str, style: str, program: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """``program(group, *args)``. Raises RankFailed in place of what it raises."""
    from .distributed import SimulationError

    __tracebackhide__ = True
    try:
        return program(group, *args)
    except SimulationError:
        raise  # names all ranks, or ends this one because of another
    except BaseException as error:
        raise RankFailed(group.rank, group.world_size, backend, *describe(error, style)) from None


def call_body(group: Any, body: Callable[..., None], values: dict[str, Any], groups: Sequence[str]) -> None:
    """The body of a test on one rank."""
    __tracebackhide__ = True
    body(**values, **dict.fromkeys(groups, group))


def call_sent_body(group: Any, sent: bytes, groups: Sequence[str]) -> None:
    """``call_body`` in another process."""
    __tracebackhide__ = True
    body, values = pickle.loads(sent)
    call_body(group, body, values, groups)


def describe(error: BaseException, style: str) -> tuple[str, str]:
    """What pytest would show of ``error``, in the style of its option ``--tb``, and the outcome of the program."""
    import pytest

    if isinstance(error, pytest.skip.Exception | pytest.xfail.Exception):
        return str(error.msg), "skipped" if isinstance(error, pytest.skip.Exception) else "xfailed"
    if isinstance(error, pytest.fail.Exception) and not error.pytrace:
        return str(error.msg), "failed"
    info = pytest.ExceptionInfo.from_exception(error)
    if style not in ("long", "short", "native"):
        shown = [entry for entry in info.traceback if not entry.frame.f_locals.get("__tracebackhide__")]
        style = "long" if len(shown) <= 2 else "short"
    return str(info.getrepr(style=style, funcargs=True)), "failed"  # type: ignore[arg-type]


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Keep torch from logging, in the report of a test, that one rank ended because another did."""
    logger = logging.getLogger("c10d-NullHandler-default")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError here after ``seconds``, naming the simulated rank that runs.

    Does nothing outside the main thread, where signals do not arrive, and where an alarm is already set.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"{what} did not end within {seconds:g} s\n{running_rank()}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def running_rank() -> str:
    """The simulated rank whose turn it is and its Python stack, most recent call first."""
    from .distributed.lockstep import RankThread

    for thread in threading.enumerate():
        # Another lockstep with an error is one of an earlier test, which a rank did not leave in time.
        if isinstance(thread, RankThread) and thread.lockstep.running is thread and thread.lockstep.error is None:
            lines = [f"rank {thread.rank}:"]
            for frame, line in traceback.walk_stack(sys._current_frames()[thread.ident or 0]):
                if frame.f_code.co_filename == __file__:
                    break
                lines.append(f'  File "{frame.f_code.co_filename}", line {line} in {frame.f_code.co_name}')
            return "\n".join(lines)
    return "no rank runs"
