"""How a script starts its ranks, and how it ends where it cannot do what was asked: with one sentence, said once."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

INSTALL = "source .venv/bin/activate, or pip install -e '.[train,hf]'"


class Parser(argparse.ArgumentParser):
    """Speaks once where a launcher starts several processes with the same arguments."""

    def _print_message(self, message: str, file: Any = None) -> None:
        process = threading.current_thread() is threading.main_thread()  # simulated ranks are threads: one is heard
        if not process or os.environ.get("LOCAL_RANK", "0") == "0":
            super()._print_message(message, file)


def run_ranks(
    program: Callable[..., Any],
    options: Any,
    *,
    simulated: int | None = None,
    num_shards: int | None = None,
    **settings: Any,
) -> None:
    """Call ``program(group, options)`` on ``simulated`` ranks in this process, or as a rank of those that a launcher
    started, whose group ``settings`` of ``init`` describe.
    """
    from src import close, init, simulate

    if simulated is None:
        program(init(num_shards=num_shards, **settings), options)
        close()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--simulate runs all ranks in one process; start it without torchrun")
    else:
        simulate(program, simulated, options, num_shards=num_shards)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the program with ``error: ...`` for what the user can mend: ValueError and ImportError of any rank."""
    try:
        yield
    except ModuleNotFoundError as error:
        _end(f"{error.name} is not installed; {INSTALL}" if error.name in ("torch", "numpy") else str(error))
    except (ValueError, ImportError) as error:
        _end(str(error))
    except RuntimeError as error:
        from src import SimulationError

        if not isinstance(error, SimulationError) or not isinstance(error.__cause__, (ValueError, ImportError)):
            raise
        _end(str(error.__cause__))


def _end(reason: str) -> NoReturn:
    sentence = f"error: {reason}"
    if _speaks(sentence):
        sys.stderr.write(sentence + "\n")  # one write: lines of several ranks do not mix
    ended = SystemExit(sentence)
    ended.code = 1
    raise ended from None


def _speaks(sentence: str) -> bool:
    """Whether this is the lowest of the ranks that end with ``sentence`` at about the same time."""
    store = _job_store()
    if store is None:
        return True
    from src.distributed.failure import roll_call

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        lines = roll_call(store, rank, list(range(world_size)), sentence)
    except RuntimeError:  # the process that keeps the store has ended
        return True
    return rank == min(other for other, line in lines.items() if line == sentence)


def _job_store() -> Any:
    """What all processes of the job write to and read; None where there is one process, or no way to reach it yet."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or "RANK" not in os.environ:
        return None
    if dist.is_initialized():
        simulated = hasattr(dist.group.WORLD, "lockstep")
        store = None if simulated else dist.distributed_c10d._get_default_store()
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
    else:
        store = None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return store and dist.PrefixStore(f"scripts-{attempt}", store)
