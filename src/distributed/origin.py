"""Where a collective comes from: the user's file and line, the module, forward or backward."""

from __future__ import annotations

import bisect
import linecache
import os
import sys
import threading
from dataclasses import dataclass, field
from itertools import islice
from types import FrameType
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


class Source:
    """The expression of a call, read from its file when it is asked for: ``train: dist.all_reduce(grad)``."""

    def __init__(self, frame: FrameType) -> None:
        self._code, self._instruction = frame.f_code, frame.f_lasti

    def __str__(self) -> str:
        position = next(islice(self._code.co_positions(), self._instruction // 2, None))
        line, _, begin, end = position
        text = linecache.getline(self._code.co_filename, line or 0).encode()
        return f"{self._code.co_qualname}: {text[begin:end].decode(errors='replace')}"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


@dataclass(frozen=True)
class Origin:
    """``site`` is ``file:line``; ``module`` a dotted path below the outermost module that runs, "" outside of any."""

    site: str
    module: str
    phase: Phase
    source: Source | str = field(default="", compare=False)

    def __str__(self) -> str:
        module = f"in {self.module}, " if self.module else ""
        return f"{module}{self.phase}, at {self.site}"


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def call_site() -> str:
    """``file:line`` of the innermost frame outside of torch, the standard library and this package."""
    return _site(_user_frame())


def _user_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _site(frame: FrameType | None) -> str:
    return "a thread without user code" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


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
        site, source = _site(frame), "" if frame is None else Source(frame)
        if not in_backward():
            running = self._here.running
            return Origin(site, _path(running[-1][0], running[0][0]) if running else "", "forward", source)
        node = torch._C._current_autograd_node()
        span = None if node is None else self._here.find(node._sequence_nr())
        return Origin(site, _path(span.module, span.root) if span else "", "backward", source)

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


def _path(module: nn.Module, root: nn.Module) -> str:
    names = (name for name, found in root.named_modules() if found is module)
    return next(names, "") or type(module).__name__
