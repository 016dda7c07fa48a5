"""What a script takes for its own process, kept for each simulated rank."""

from __future__ import annotations

import io
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d

from .distributed.rank_state import RankState

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class OwnModules:
    """The modules of which every rank imports its own copy: ``__main__`` and those below ``root``."""

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(root) + os.sep
        self._names = {"__main__"}
        self._seen = 0

    def take(self) -> dict[str, types.ModuleType]:
        """Remove them from ``sys.modules`` and return them."""
        if len(sys.modules) != self._seen:
            self._names |= {name for name, module in list(sys.modules.items()) if self._is_own(module)}
        taken = {name: sys.modules.pop(name) for name in self._names if name in sys.modules}
        self._seen = len(sys.modules)
        return taken

    def put(self, modules: Mapping[str, types.ModuleType]) -> None:
        """Make ``modules`` the ones that the process sees."""
        self.take()
        sys.modules.update(modules)
        self._seen = len(sys.modules)

    def _is_own(self, module: Any) -> bool:
        path = getattr(module, "__file__", None) or ""
        installed = path.startswith((_PACKAGE, sys.prefix + os.sep, sys.base_prefix + os.sep))
        return path.startswith(self._root) and (not installed or self._root.startswith(sys.prefix + os.sep))


class ScriptState(RankState):
    """Besides random states: environment, arguments, folder, own modules, hooks, loggers, and torch's process groups.

    ``store`` is the job's, ``backend`` the one that the script asked for.
    """

    def __init__(self, own: OwnModules, store: Store) -> None:
        self._own = own
        self.world: Any = distributed_c10d._world
        self.environ = dict(os.environ)
        self.argv, self.path = list(sys.argv), list(sys.path)
        self.modules: dict[str, types.ModuleType] = {}
        self.root_logger = logging.root
        self.manager = logging.Logger.manager
        self.backend, self.store = "gloo", store
        super().__init__()

    def save(self) -> None:
        super().save()
        self.environ, self.folder = dict(os.environ), os.getcwd()
        self.argv, self.path, self.hook = sys.argv, sys.path, sys.excepthook
        self.modules = self._own.take()
        self._own.put(self.modules)

    def restore(self, previous: RankState | None = None) -> None:
        super().restore(previous)
        if os.environ != self.environ:
            for name in set(os.environ) - set(self.environ):
                del os.environ[name]
            os.environ.update(self.environ)
        os.chdir(self.folder)
        sys.argv, sys.path, sys.excepthook = self.argv, self.path, self.hook
        self._own.put(self.modules)
        logging.root = logging.Logger.root = self.root_logger
        logging.Logger.manager = self.manager
        distributed_c10d._world = self.world

    @classmethod
    def fresh(
        cls, own: OwnModules, store: Store, environ: Mapping[str, str], argv: list[str], main: types.ModuleType
    ) -> ScriptState:
        """The state with which a rank begins."""
        state = cls(own, store)
        state.environ, state.argv = {**state.environ, **environ}, argv
        state.modules = {"__main__": main}
        state.world = _new_world()
        state.root_logger = logging.RootLogger(logging.WARNING)
        state.manager = logging.Manager(state.root_logger)
        return state


def _new_world() -> Any:
    """A rank's own registry of process groups, in place of the process's (torch's documented extension point)."""
    shared = type(distributed_c10d._world)
    names = [name for name, value in vars(shared).items() if isinstance(value, property)]
    kept = [name for name in names if name not in ("default_pg", "pg_config_info")]
    own = type("RankWorld", (shared,), dict.fromkeys(kept))()
    for name in kept:
        setattr(own, name, type(getattr(distributed_c10d._world, name))())
    return own


class ReaderGone(BrokenPipeError):
    """Nobody reads the output any more, as when ``head`` has seen enough."""


class RankOutput(io.TextIOBase):
    """Writes whole lines, each with the rank that printed it: ``[rank2]: loss 3.1``."""

    def __init__(self, stream: TextIO, rank: Callable[[], int | None]) -> None:
        self._stream, self._rank = stream, rank
        self._begun: dict[int, str] = {}

    def write(self, text: str) -> int:
        rank = self._rank()
        with self._reader():
            if rank is None:
                return self._stream.write(text)
            *lines, self._begun[rank] = (self._begun.get(rank, "") + text).split("\n")
            for line in lines:
                self._stream.write(f"[rank{rank}]: {line}\n")
        return len(text)

    def flush(self) -> None:
        with self._reader():
            self._stream.flush()

    def finish(self) -> None:
        """Write lines that were begun and not ended, if anybody reads them."""
        with suppress(ReaderGone), self._reader():
            for rank, text in sorted(self._begun.items()):
                if text:
                    self._stream.write(f"[rank{rank}]: {text}\n")
            self._begun.clear()
            self._stream.flush()

    @contextmanager
    def _reader(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())  # for the flush at the end
            raise ReaderGone from None

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding
