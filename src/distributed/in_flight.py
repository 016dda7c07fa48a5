"""Buffers that a collective still writes: whoever uses one before ``wait()`` is told so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from .signature import Call


class InFlight(TorchDispatchMode):
    """Sees every operator of one thread while buffers are in flight, and compares the storages of its arguments.

    It lies below the modes that the program has entered, whose own entering and leaving it does not disturb.
    ``report(call, operator)`` is called for a tensor that shares memory with a buffer of ``call``.
    """

    def __init__(self, report: Callable[[Call, str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._report = report
        self._buffers: dict[Any, tuple[Call, Sequence[Tensor], bool]] = {}

    def add(self, work: Any, call: Call, buffers: Sequence[Tensor], *, by_reading: bool) -> None:
        """From now on ``buffers`` must not be used, or, where the call only reads them, not be written."""
        if not self._buffers:
            _at_the_bottom(lambda modes: [self, *modes])
        self._buffers[work] = call, buffers, by_reading

    def remove(self, work: Any) -> None:
        """``work`` has been waited for."""
        if self._buffers.pop(work, None) is not None and not self._buffers:
            _at_the_bottom(lambda modes: [mode for mode in modes if mode is not self])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        arguments = {argument.name: argument for argument in func._schema.arguments}
        for name, value in (*zip(arguments, args, strict=False), *kwargs.items()):
            alias = arguments[name].alias_info
            if alias is None or alias.is_write:  # else the result is a view: nothing is read
                for tensor in _tensors(value):
                    self._check(tensor, alias is not None, str(func))
        return func(*args, **kwargs)

    def _check(self, tensor: Tensor, written: bool, operator: str) -> None:
        for call, buffers, by_reading in self._buffers.values():
            if (written or not by_reading) and any(_overlap(tensor, buffer) for buffer in buffers):
                self._report(call, operator)


def _at_the_bottom(change: Callable[[list[Any]], list[Any]]) -> None:
    modes = _get_current_dispatch_mode_stack()
    for _ in modes:
        _pop_mode()
    for mode in change(modes):
        _push_mode(mode)


def _tensors(value: Any) -> Iterator[Tensor]:
    if type(value) in (Tensor, nn.Parameter):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _overlap(one: Tensor, other: Tensor) -> bool:
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    starts, ends = zip(*((t.data_ptr(), t.data_ptr() + _extent(t)) for t in (one, other)), strict=True)
    return bool(max(starts) < min(ends))


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to behind the last element."""
    if tensor.numel() == 0:
        return 0
    return (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.element_size()
