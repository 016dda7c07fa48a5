"""A process group that states, before each collective, what is asked of it: the ground of simulation and checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .signature import Signature, reduce_op_name, specs


class SignedProcessGroup(dist.ProcessGroup):
    """Brings every method by which torch calls a process group down to ``_run``.

    A subclass says there what becomes of a method: its torch 2.13 name, what the ranks must agree on, the
    method's arguments, the tensors that it writes, and torch's options.
    """

    def _run(
        self, method: str, signature: Signature, args: tuple[Any, ...], outputs: Sequence[Tensor], opts: Any
    ) -> dist.Work:
        raise NotImplementedError

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._run("barrier", Signature("barrier"), (), [], opts)

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        self.barrier().wait()

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        signature = Signature("all_reduce", reduce_op_name(opts), None, specs(tensors))
        return self._run("allreduce", signature, (tensors,), tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        signature = Signature("all_reduce", reduce_op_name(opts), None, specs(tensors))
        return self._run("allreduce_coalesced", signature, (tensors,), tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        signature = Signature("reduce", reduce_op_name(opts), opts.rootRank, specs(tensors))
        return self._run("reduce", signature, (tensors,), tensors, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        signature = Signature("broadcast", None, opts.rootRank, specs(tensors))
        return self._run("broadcast", signature, (tensors,), tensors, opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        signature = Signature("all_gather", None, None, specs(inputs))
        return self._run("allgather", signature, (outputs, inputs), _flat(outputs), opts)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        signature = Signature("all_gather", None, None, specs(inputs))
        return self._run("allgather_coalesced", signature, (outputs, inputs), _flat(outputs), opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        signature = Signature("all_gather", None, None, specs([output, input]))
        return self._run("all_gather_single", signature, (output, input), [output], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        signature = Signature("all_gather", None, None, specs([*outputs, *inputs]))
        return self._run("all_gather_single_coalesced", signature, (outputs, inputs), outputs, opts)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> dist.Work:
        signature = Signature("reduce_scatter", reduce_op_name(opts), None, specs(outputs))
        return self._run("reduce_scatter", signature, (outputs, inputs), outputs, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any) -> dist.Work:
        signature = Signature("reduce_scatter", reduce_op_name(opts), None, specs([output, input]))
        return self._run("reduce_scatter_single", signature, (output, input), [output], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> dist.Work:
        signature = Signature("reduce_scatter", reduce_op_name(opts), None, specs([*outputs, *inputs]))
        return self._run("reduce_scatter_single_coalesced", signature, (outputs, inputs), outputs, opts)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        signature = Signature("all_to_all", None, None, _rows(inputs[0]))
        return self._run("alltoall", signature, (outputs, inputs), outputs, opts)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], opts: Any = None
    ) -> dist.Work:
        signature = Signature("all_to_all", None, None, _rows(input))
        args = (output, input, output_splits, input_splits)
        return self._run("all_to_all_single", signature, args, [output], opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> dist.Work:
        signature = Signature("gather", None, opts.rootRank, specs(inputs))
        return self._run("gather", signature, (outputs, inputs), _flat(outputs), opts)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> dist.Work:
        signature = Signature("scatter", None, opts.rootRank, specs(outputs))
        return self._run("scatter", signature, (outputs, inputs), outputs, opts)

    # Names that torch before 2.13 calls.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _flat(lists: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for tensors in lists for tensor in tensors]


def _rows(tensor: Tensor) -> tuple[str]:
    """Dtype and shape but for the first dim, in which ranks may differ."""
    (spec,) = specs([tensor[:0]]) if tensor.dim() else specs([tensor])
    return (spec.replace("[0", "[*", 1),)
