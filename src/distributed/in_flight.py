"""Buffers that a collective still writes: whoever uses one before ``wait()`` is told so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn, overrides
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from .signature import Call

_READ_WITHOUT_OPERATOR = {"tolist", "numpy", "__array__", "__dlpack__"}


class InFlight(TorchDispatchMode):
    """Sees what one thread does with tensors while buffers are in flight, and compares storages.

    It lies below the modes that the program has entered, whose own entering and leaving it does not disturb.
    ``report(call, operator)`` is called for a tensor that shares memory with a buffer of ``call``.
    """

    def __init__(self, report: Callable[[Call, str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._report = report
        self._functions = _Functions(self)
        self._buffers: dict[Any, tuple[Call, Sequence[Tensor], Sequence[Tensor]]] = {}

    @property
    def empty(self) -> bool:
        """Whether no buffer is in flight."""
        return not self._buffers

    def add(self, work: Any, call: Call, written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
        """From now on what ``call`` writes must not be used, and what it reads must not be written."""
        if not self._buffers:
            _insert(_dispatch_modes, self)
            _insert(_function_modes, self._functions)
        self._buffers[work] = call, written, read

    def remove(self, work: Any) -> None:
        """``work`` has been waited for."""
        if self._buffers.pop(work, None) is not None and not self._buffers:
            _remove(_dispatch_modes, self)
            _remove(_function_modes, self._functions)

    def check(self, tensor: Tensor, by_writing: bool, operator: str) -> None:
        """Report a use of ``tensor``, unless it touches no buffer."""
        for call, written, read in self._buffers.values():
            if any(_overlap(tensor, buffer) for buffer in (*written, *(read if by_writing else ()))):
                self._report(call, operator)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        arguments = {argument.name: argument for argument in func._schema.arguments}
        for name, value in (*zip(arguments, args, strict=False), *kwargs.items()):
            alias = arguments[name].alias_info
            if alias is None or alias.is_write:  # else the result is a view: nothing is read
                for tensor in tensors_in(value):
                    self.check(tensor, alias is not None, str(func))
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Reads that go past the operators."""

    def __init__(self, in_flight: InFlight) -> None:
        super().__init__()
        self._in_flight = in_flight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READ_WITHOUT_OPERATOR:
            for tensor in tensors_in(args):
                self._in_flight.check(tensor, False, f"Tensor.{name}")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Stack:
    """Torch's stack of modes of one kind in this thread."""

    modes: Callable[[], list[Any]]
    push: Callable[[Any], None]
    pop: Callable[[], Any]

    def replace(self, modes: list[Any]) -> None:
        for _ in self.modes():
            self.pop()
        for mode in modes:
            self.push(mode)


_dispatch_modes = _Stack(
    _python_dispatch._get_current_dispatch_mode_stack, _python_dispatch._push_mode, _python_dispatch._pop_mode
)
_function_modes = _Stack(overrides._get_current_function_mode_stack, overrides._push_mode, overrides._pop_mode)


def _insert(stack: _Stack, mode: Any) -> None:
    stack.replace([mode, *stack.modes()])


def _remove(stack: _Stack, mode: Any) -> None:
    stack.replace([other for other in stack.modes() if other is not mode])


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The ordinary tensors in nested tuples, lists and dicts."""
    if type(value) in (Tensor, nn.Parameter):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def _overlap(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta:  # of which each lies at address 0
        return False
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    starts, ends = zip(*((t.data_ptr(), t.data_ptr() + _extent(t)) for t in (one, other)), strict=True)
    return bool(max(starts) < min(ends))


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to behind the last element."""
    if tensor.numel() == 0:
        return 0
    return (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.element_size()
