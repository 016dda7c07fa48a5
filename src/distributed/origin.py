"""Where a collective comes from: the user's file and line, the module, forward or backward."""

from __future__ import annotations

import bisect
import functools
import linecache
import os
import sys
import threading
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed import distributed_c10d

Phase = Literal["forward", "backward"]

_TORCH, _PACKAGE, _STANDARD = (
    os.path.dirname(os.path.abspath(path)) + os.sep
    for path in (torch.__file__, os.path.dirname(__file__), threading.__file__)
)
_USERS = os.sep + "site-packages" + os.sep
_DECORATORS = os.sep + "typing_extensions.py"
KEPT_SPANS = 100_000


class Origin:
    """Where a collective was called. Its words are made when somebody asks for them, or pickles it."""

    def __init__(
        self, phase: Phase, frame: FrameType | None, module: nn.Module | None = None, root: nn.Module | None = None
    ) -> None:
        self.phase, self._module, self._root = phase, module, root
        self._code = None if frame is None else frame.f_code
        self._instruction = 0 if frame is None else frame.f_lasti

    @functools.cached_property
    def site(self) -> str:
        """``file:line``."""
        if self._code is None:
            return "a thread without user code"
        return f"{self._code.co_filename}:{_position(self._code, self._instruction)[0]}"

    @functools.cached_property
    def module(self) -> str:
        """A dotted path below the outermost module that runs, "" outside of any."""
        if self._module is None or self._root is None:
            return ""
        names = (name for name, found in self._root.named_modules() if found is self._module)
        return next(names, "") or type(self._module).__name__

    @functools.cached_property
    def source(self) -> str:
        """The expression of the call, read from its file: ``train: dist.all_reduce(grad)``."""
        if self._code is None:
            return ""
        line, _, begin, end = _position(self._code, self._instruction)
        text = linecache.getline(self._code.co_filename, line or 0).encode()
        return f"{self._code.co_qualname}: {text[begin:end].decode(errors='replace')}"

    def __getstate__(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("phase", "site", "module", "source")}

    def __str__(self) -> str:
        module = f"in {self.module}, " if self.module else ""
        return f"{module}{self.phase}, at {self.site}"


def _position(code: CodeType, instruction: int) -> tuple[int | None, int | None, int | None, int | None]:
    """Line, last line, first and last byte of an instruction's expression."""
    return next(islice(code.co_positions(), instruction // 2, None))


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def call_site() -> str:
    """``file:line`` of the innermost frame outside of torch, the standard library and this package."""
    return Origin("forward", _user_frame()).site


def _user_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


@functools.cache
def is_library(path: str) -> bool:
    """Whether a source file belongs to torch (and its decorators), to the standard library or to this package."""
    if path.startswith((_TORCH, _PACKAGE, "<frozen")) or path.endswith(_DECORATORS):
        return True
    return path.startswith(_STANDARD) and _USERS not in path


def importing() -> bool:
    """Whether this thread is in the middle of importing a module."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load":
            return True
        frame = frame.f_back
    return False


def called_by_torch_api() -> bool:
    """Whether the nearest caller outside this package is Python code of ``torch.distributed``'s public functions."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == distributed_c10d.__file__


class ModuleTracker:
    """Knows which module runs in each thread, and, in backward, which module a node of the graph was made by.

    Autograd numbers the nodes that a thread makes; the numbers made while a module ran are its span. Works from
    ``start`` to ``stop`` by hooks on all modules.
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._here = _ThreadModules()

    def start(self) -> None:
        """Install the hooks."""
        self._hooks = [
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def origin(self) -> Origin:
        """Of the collective that is being called in this thread."""
        frame = _user_frame()
        if not in_backward():
            running = self._here.running
            return Origin("forward", frame, running[-1][0], running[0][0]) if running else Origin("forward", frame)
        node = torch._C._current_autograd_node()
        span = None if node is None else self._here.find(node._sequence_nr())
        return Origin("backward", frame, span.module, span.root) if span else Origin("backward", frame)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._here.running.append((module, torch.autograd._get_sequence_nr()))  # type: ignore[attr-defined]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        running = self._here.running
        while running and running[-1][0] is not module:
            running.pop()
        if running:
            root = running[0][0]
            self._here.close(*running.pop(), root)


@dataclass(frozen=True)
class _Span:
    start: int
    end: int
    module: nn.Module
    root: nn.Module


class _ThreadModules(threading.local):
    def __init__(self) -> None:
        self.running: list[tuple[nn.Module, int]] = []
        self.spans: list[_Span] = []

    def close(self, module: nn.Module, start: int, root: nn.Module) -> None:
        end = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        if end > start:
            self.spans.append(_Span(start, end, module, root))
        if len(self.spans) > 2 * KEPT_SPANS:
            del self.spans[:KEPT_SPANS]

    def find(self, number: int) -> _Span | None:
        """The innermost span: inner modules end before outer ones do."""
        first = bisect.bisect_right(self.spans, number, key=lambda span: span.end)
        return next((span for span in self.spans[first:] if span.start <= number), None)
