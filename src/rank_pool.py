"""Processes that start once and run program after program, each as one rank of a real process group."""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Host = Callable[[Callable[[], None]], object]

GRACE = 0.3
"""Seconds between two answers after a rank has failed; then the others are taken to wait for it."""


class RankFailed(RuntimeError):
    """What ended the program of ``rank``; ``text`` is that rank's own traceback. ``outcome``: a word for it."""

    def __init__(self, rank: int, world_size: int, backend: str, text: str, outcome: str = "failed") -> None:
        super().__init__(rank, world_size, backend, text, outcome)
        self.rank, self.world_size, self.backend, self.text, self.outcome = self.args

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} ({self.backend}) {self.outcome}:\n{self.text}"


class RankPool:
    """``world_size`` processes of one ``backend`` ("gloo" or "nccl") that run programs ``program(group, *args)``.

    Processes start at the first ``run``, each with one intra-op thread, and stay. A program must be importable (a
    function at module level); arguments and results are pickled. When a rank fails, all are ended, and the next
    ``run`` starts new ones. ``timeout`` is the time for one program in seconds, without that of starting the
    processes, ``start_timeout``. ``host`` is called in each process, with the function that serves the programs.
    """

    def __init__(
        self,
        backend: str,
        world_size: int,
        timeout: float = 120.0,
        *,
        start_timeout: float = 120.0,
        host: Host | None = None,
    ) -> None:
        self.backend, self.world_size, self.timeout = backend, world_size, timeout
        self.start_timeout, self.host = start_timeout, host
        self._processes: list[multiprocessing.context.SpawnProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, program: Callable[..., Any], *args: Any, **group_options: Any) -> list[Any]:
        """``program(Group(**group_options), *args)`` on every rank; results in rank order.

        Raises RankFailed for the lowest rank that failed, TimeoutError with the Python stacks of the ranks that did
        not answer in time, and TypeError if the program or an argument cannot be pickled.
        """
        try:
            task = pickle.dumps((program, args, group_options))
        except Exception as error:
            text = f"the program or an argument cannot be sent to {self.backend} processes: {error}"
            raise TypeError(text) from error
        try:
            if not self._processes:
                self._start()
            for pipe in self._pipes:
                with suppress(BrokenPipeError):  # its process has ended, which _collect will find and name
                    pipe.send_bytes(task)
            return self._collect("did not answer", self.timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="isoshard-")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            args = (theirs, self.host, self.backend, rank, self.world_size, Path(self._folder.name))
            process = context.Process(target=_work, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect("did not start", self.start_timeout)

    def _collect(self, lateness: str, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, RankFailed] = {}
        deadline = time.monotonic() + timeout
        while open_pipes := {p: rank for rank, p in enumerate(self._pipes) if rank not in results | failures}:
            ready = wait(list(open_pipes), timeout=GRACE if failures else max(deadline - time.monotonic(), 0))
            if not ready and not failures:
                late = sorted(open_pipes.values())
                what = f"ranks {late} of {self.world_size} ({self.backend}) {lateness} within {timeout:g} s"
                raise TimeoutError("\n".join([what, *self._stacks(late)]))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = open_pipes[pipe]
                failure, result = self._receive(pipe, rank)
                if failure is None:
                    results[rank] = result
                else:
                    failures[rank] = failure
        if failures:
            raise failures[min(failures)]
        return [results[rank] for rank in range(self.world_size)]

    def _receive(self, pipe: Connection, rank: int) -> tuple[RankFailed | None, Any]:
        try:
            answer: tuple[RankFailed | None, Any] = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(timeout=5)
            text = f"its process ended with exit code {self._processes[rank].exitcode}"
            answer = RankFailed(rank, self.world_size, self.backend, text), None
        return answer

    def _stacks(self, ranks: Sequence[int]) -> list[str]:
        """Where each of ``ranks`` is now, as far as their processes still say so."""
        assert self._folder is not None
        files = {rank: _stack_file(Path(self._folder.name), rank) for rank in ranks}
        for rank in ranks:
            pid = self._processes[rank].pid
            assert pid is not None
            os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and not all(f.exists() and f.stat().st_size for f in files.values()):
            time.sleep(0.02)
        time.sleep(0.1)  # the file is written line by line
        return [f"rank {rank}:\n{_program_stack(f.read_text())}" for rank, f in files.items() if f.exists()]


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack {rank}"


def _program_stack(dump: str) -> str:
    """The frames of the program, most recent first, in what faulthandler says about all threads of a process."""
    mine = f'File "{os.path.dirname(__file__)}{os.sep}rank_'
    for thread in dump.split("\n\n"):
        frames = thread.splitlines()[1:]
        ours = [i for i, frame in enumerate(frames) if mine in frame]
        if ours and " in _watch" not in thread:
            return "\n".join(frames[: ours[0]])
    return "  (no Python frame)"


def _work(pipe: Connection, host: Host | None, *place: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    threading.Thread(target=_watch, daemon=True).start()
    serve = functools.partial(_serve, pipe, *place)
    if host is None:
        serve()
    else:
        host(serve)


def _watch() -> None:
    """End with the parent, also when it is killed while this process waits for another rank."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _serve(pipe: Connection, backend: str, rank: int, world_size: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from .distributed import Group

    with _stack_file(folder, rank).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        pipe.send_bytes(pickle.dumps((None, None)))
        while True:
            try:
                task = pipe.recv_bytes()
            except EOFError:
                return
            try:
                program, args, group_options = pickle.loads(task)
                answer = pickle.dumps((None, program(Group(**group_options), *args)))
            except RankFailed as failure:
                answer = pickle.dumps((failure, None))
            except BaseException:
                answer = pickle.dumps((RankFailed(rank, world_size, backend, traceback.format_exc()), None))
            sys.stdout.flush()
            sys.stderr.flush()
            pipe.send_bytes(answer)
