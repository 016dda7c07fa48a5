"""Gradients that autograd adds to a ``.grad`` that is there, few rows of a whole table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_added_to_grad(node: Any) -> bool:
    """Whether autograd adds what ``node`` is given to a dense ``.grad``, and no hook of the parameter sees it."""
    if type(node).__name__ != "AccumulateGrad" or node.variable._backward_hooks:
        return False
    grad = node.variable.grad
    if grad is None or grad.layout is not torch.strided or not grad.is_contiguous():
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # for torch.autograd.grad, which returns it
        return False


def gradient_of_rows(rows: Tensor, values: Tensor, height: int) -> Tensor:
    """``values [n, e]`` in ``rows [n]``, distinct and sorted, of ``[height, e]``; there is nothing elsewhere.

    Autograd adds them to a dense ``.grad`` in place, without atomics, with the bits of a whole table: none is made.
    """
    with torch.sparse.check_sparse_tensor_invariants(False):  # the argument of this name makes torch 2.11 warn
        return torch.sparse_coo_tensor(rows[None], values, (height, values.shape[1]), is_coalesced=True)


def is_first_of_backward(node: Any) -> bool:
    """Whether the backward that is running asks this for ``node`` for the first time.

    On a GPU the sum of two sparse gradients is a list of both, which atomics would add in any order: one of several
    lookups in a table may have such a gradient, the others are dense.
    """
    backward, last = torch._C._current_graph_task_id(), node.metadata.get(__name__, -1)
    node.metadata[__name__] = backward
    return bool(backward > last)  # one that runs inside of another has the greater number
