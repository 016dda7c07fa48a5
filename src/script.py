"""An unmodified torchrun script as N simulated ranks in this process.

What a script changes for its whole process is kept per rank (``script_state``); the functions below stand in for
torch's, in the threads of ranks alone, while the script runs. What cannot work is refused.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # it notes the default group when it is imported
import torch.multiprocessing
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d

from .distributed.lockstep import Lockstep, RankThread, SimulationError
from .distributed.lockstep_store import LockstepStore
from .distributed.origin import is_library
from .distributed.simulation import BACKEND, rank_settings, register_backend
from .script_state import OwnModules, RankOutput, ReaderGone, ScriptState


def run_script(
    loaded: Sequence[tuple[types.CodeType, types.ModuleType]],
    root: str,
    argv: list[str],
    environs: Sequence[Mapping[str, str]],
    schedule: random.Random | None,
) -> int:
    """Run a script as one rank per entry of ``environs``; the exit status, 1 if any rank failed.

    ``loaded`` is its code with a ``__main__`` for each rank, ``root`` the folder below which modules are the script's.
    """
    own = OwnModules(root)
    lockstep = Lockstep(len(environs), schedule=schedule)
    store = LockstepStore(lockstep)
    outer = ScriptState(own, store)
    threads = int(environs[0].get("OMP_NUM_THREADS", torch.get_num_threads()))
    states = [
        ScriptState.fresh(own, store, environ, list(argv), main)
        for environ, (_, main) in zip(environs, loaded, strict=True)
    ]

    def body(rank: int) -> None:
        code, main = loaded[rank]
        try:
            with rank_settings(threads):
                exec(code, main.__dict__)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise

    register_backend()
    outputs = [RankOutput(stream, _current_rank) for stream in (sys.stdout, sys.stderr)]
    try:
        with _stand_ins(outputs), torch.compiler.set_stance("force_eager"):
            lockstep.run(body, states)
    except SimulationError as error:
        if not isinstance(error.__cause__, ReaderGone):
            with suppress(ReaderGone):
                _report(error, outputs[1])
        return 1
    finally:
        for output in outputs:
            output.finish()
        outer.restore()
    return 0


def load_script(path: str) -> tuple[types.CodeType, types.ModuleType]:
    """The code of the file ``path``, and a ``__main__`` for it. Raises OSError and SyntaxError."""
    path = os.path.abspath(path)
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    return code, _main_module(__file__=path)


def load_module(name: str) -> tuple[types.CodeType, types.ModuleType]:
    """The code of the module ``name``, and a ``__main__`` for it. Raises ImportError when there is none."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    loader: Any = None if spec is None else spec.loader
    if spec is None or not hasattr(loader, "get_code"):
        raise ImportError(f"no module named {name} that could be run")
    return loader.get_code(spec.name), _main_module(__file__=spec.origin, __package__=spec.parent, __spec__=spec)


def rank_environ(rank: int, nodes: int, per_node: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    local = rank % per_node
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    values = {
        "RANK": rank,
        "LOCAL_RANK": local % gpus if 0 < gpus < per_node else local,
        "GROUP_RANK": rank // per_node,
        "ROLE_RANK": rank,
        "WORLD_SIZE": nodes * per_node,
        "LOCAL_WORLD_SIZE": per_node,
        "GROUP_WORLD_SIZE": nodes,
        "ROLE_WORLD_SIZE": nodes * per_node,
        "ROLE_NAME": "default",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 29500,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_RUN_ID": "simulated",
    }
    return {name: str(value) for name, value in values.items()}


def _main_module(**attributes: Any) -> types.ModuleType:
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=__builtins__, **attributes)
    return module


def _current_rank() -> int | None:
    thread = threading.current_thread()
    return thread.rank if isinstance(thread, RankThread) else None


@contextmanager
def _stand_ins(outputs: list[RankOutput]) -> Iterator[None]:
    spawn = _refuse("a simulated rank cannot start further ranks as processes")
    stand_ins: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (distributed_c10d, "init_process_group", _init_process_group),
        (distributed_c10d, "_new_process_group_helper", _new_group),
        (distributed_c10d, "get_backend", _get_backend),
        (dist, "TCPStore", _store),
        (dist, "FileStore", _store),
        (signal, "signal", _refuse("signal handlers belong to the process, which simulated ranks share")),
        (torch.multiprocessing, "spawn", spawn),
        (torch.multiprocessing, "start_processes", spawn),
    ]
    with ExitStack() as stack:
        for module, name, make in stand_ins:
            original = getattr(module, name)
            for holder in [found for found in list(sys.modules.values()) if vars(found).get(name) is original]:
                stack.enter_context(mock.patch.object(holder, name, _in_ranks(original, make)))
        stack.enter_context(mock.patch.object(sys, "stdout", outputs[0]))
        stack.enter_context(mock.patch.object(sys, "stderr", outputs[1]))
        isolate: Callable[[bool], None] = _distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
        isolate(True)
        stack.callback(isolate, False)
        yield


def _in_ranks(original: Any, make: Callable[[Any], Any]) -> Any:
    """``make(original)`` in the threads of ranks, ``original`` in all others."""
    stand_in = make(original)

    def choose(*args: Any, **options: Any) -> Any:
        return (original if _current_rank() is None else stand_in)(*args, **options)

    return choose


def _thread() -> tuple[RankThread, ScriptState]:
    thread = threading.current_thread()
    assert isinstance(thread, RankThread) and isinstance(thread.state, ScriptState)
    return thread, thread.state


def _init_process_group(original: Any) -> Any:
    def init_process_group(
        backend: Any = None,
        init_method: Any = None,
        timeout: Any = None,
        world_size: int = -1,
        rank: int = -1,
        **_: Any,
    ) -> None:
        thread, state = _thread()
        lockstep = thread.lockstep
        if rank not in (-1, thread.rank) or world_size not in (-1, lockstep.world_size):
            raise ValueError(
                f"init_process_group(rank={rank}, world_size={world_size}) in simulated rank {thread.rank} "
                f"of {lockstep.world_size}"
            )
        state.backend = str(backend or "gloo")
        size = lockstep.world_size
        original(BACKEND, rank=thread.rank, world_size=size, store=state.store, pg_options=lockstep)

    return init_process_group


def _new_group(original: Any) -> Any:
    def new_group(size: int, rank: int, ranks: Any, backend: Any, store: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(options.get("backend_options"), Lockstep):
            options["backend_options"] = None
        options["device_id"] = None
        return original(size, rank, ranks, dist.Backend(BACKEND), store, *args, **options)

    return new_group


def _get_backend(original: Any) -> Any:
    def get_backend(group: Any = None) -> Any:
        original(group)  # raises where there is no group
        return dist.Backend(_thread()[1].backend)

    return get_backend


def _store(original: Any) -> Any:
    def store(*address: Any, **options: Any) -> Any:
        place = "/".join(map(str, (original.__name__, *address[:2])))
        return PrefixStore(place, _thread()[1].store)

    return store


def _refuse(reason: str) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def refuse(*args: Any, **options: Any) -> Any:
            raise SimulationError(f"{original.__module__}.{original.__name__}() under --simulate: {reason}")

        return refuse

    return make


def _report(error: SimulationError, output: RankOutput) -> None:
    """The traceback of the script's own exception, as its rank would have printed it, and what went wrong."""
    cause, lines = error.__cause__, []
    if isinstance(cause, SystemExit):
        lines = [cause.code] if isinstance(cause.code, str) else []
    elif cause is not None and not isinstance(cause, (SimulationError, KeyboardInterrupt)):
        trace = traceback.TracebackException.from_exception(cause)
        trace.stack = traceback.StackSummary.from_list([f for f in trace.stack if not is_library(f.filename)])
        lines = "".join(trace.format()).splitlines()
    output.write("".join(f"[rank{error.rank}]: {line}\n" for line in lines))
    output.write(f"isoshard run: {error}\n")
