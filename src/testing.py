"""Running one test body on N ranks: processes that are started once and serve program after program."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from .distributed import Group


class RankPool:
    """``world_size`` processes of one ``backend`` ("gloo" or "nccl") that run programs ``program(group, *args)``.

    Processes start at the first ``run``, each with one intra-op thread, and stay. A program must be importable (a
    function at module level); arguments and results are pickled. When a rank fails, all are ended, and the next
    ``run`` starts new ones.
    """

    def __init__(self, backend: str, world_size: int, timeout: float = 120.0) -> None:
        self.backend, self.world_size, self.timeout = backend, world_size, timeout
        self._processes: list[multiprocessing.context.SpawnProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, program: Callable[..., Any], *args: Any, **group_options: Any) -> list[Any]:
        """``program(Group(**group_options), *args)`` on every rank; results in rank order.

        Raises RuntimeError with the traceback of the first rank that failed, and TimeoutError naming the ranks that
        did not answer within ``timeout`` seconds.
        """
        if not self._processes:
            self._start()
        task = pickle.dumps((program, args, group_options))
        try:
            for pipe in self._pipes:
                with suppress(BrokenPipeError):  # its process has ended, which _collect will find and name
                    pipe.send_bytes(task)
            return self._collect()
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

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="isoshard-")
        store = os.path.join(self._folder.name, "store")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            args = (theirs, self.backend, rank, self.world_size, store)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + self.timeout
        while len(results) < self.world_size:
            open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}
            ready = wait(list(open_pipes), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"ranks {sorted(open_pipes.values())} did not answer within {self.timeout:g} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = open_pipes[pipe]
                try:
                    failure, results[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(timeout=5)
                    failure = f"its process ended with exit code {self._processes[rank].exitcode}"
                if failure:
                    raise RuntimeError(f"rank {rank} of {self.world_size} failed:\n{failure}")
        return [results[rank] for rank in range(self.world_size)]


def _serve(pipe: Connection, backend: str, rank: int, world_size: int, store: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            program, args, group_options = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps((None, program(Group(**group_options), *args)))
        except BaseException:
            answer = pickle.dumps((traceback.format_exc(), None))
        pipe.send_bytes(answer)
