"""What one rank holds and sends in a training step, found by running the model on the meta device.

Nothing is allocated and nothing computed: tensors there have shapes and types only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from src import Group, Ledger, simulate
from src.distributed.ledger import Record
from src.modeling import ModelArgs, Transformer, vocab_parallel_cross_entropy
from src.modeling.parameters import placements

SHALLOW = 2
"""Layers that are run: the last of them stands for all the others, which are like it."""


@dataclass(frozen=True)
class Job:
    """A step of ``batch_size`` sequences of ``seq_len`` tokens each, in ``dtype`` throughout.

    ``master_weights`` gives AdamW a float32 copy of the weights. The KV cache holds as many sequences and tokens.
    """

    args: ModelArgs
    batch_size: int
    seq_len: int
    dtype: torch.dtype
    num_shards: int | None = None
    sequence_parallel: bool = False
    master_weights: bool = False


@dataclass(frozen=True)
class RankPlan:
    """One rank of ``tp``: its number of ``parameters``, its ``memory`` in bytes by kind, and what a step sends.

    ``all_parameters`` are those of the whole model, each counted once.
    """

    tp: int
    parameters: int
    all_parameters: int
    memory: dict[str, int]
    kv_cache: int
    ledger: Ledger


def plan_rank(job: Job, tp: int) -> RankPlan:
    """The plan of rank 0, which all ranks share, of ``tp`` simulated ranks.

    At most two layers are run; the others add what the last of those adds. Raises SimulationError, its cause a
    ValueError, for a model that cannot be sharded over ``tp`` ranks.
    """
    args = replace(job.args, max_batch_size=job.batch_size, max_seq_len=job.seq_len)
    shallow = replace(args, n_layers=min(args.n_layers, SHALLOW))
    measured: _Measured = simulate(_measure, tp, replace(job, args=shallow), num_shards=job.num_shards)[0]
    total = measured.whole.plus(measured.last_layer, args.n_layers - shallow.n_layers)
    memory = {"parameters": total.weights, "gradients": total.gradients, "AdamW moments": 8 * total.parameters}
    if job.master_weights:
        memory["master weights"] = 4 * total.parameters
    memory["activations"] = total.activations
    ledger = Ledger()
    ledger.records = repeat_layer(measured.records, shallow.n_layers - 1, args.n_layers - shallow.n_layers)
    return RankPlan(tp, total.parameters, total.all_parameters, memory, total.kv_cache, ledger)


@dataclass(frozen=True)
class _Amounts:
    """Parameters on this rank and in all; bytes of everything else."""

    parameters: int
    all_parameters: int
    weights: int
    gradients: int
    activations: int
    kv_cache: int

    def plus(self, layer: _Amounts, times: int) -> _Amounts:
        return _Amounts(*(mine + times * its for mine, its in zip(_values(self), _values(layer), strict=True)))


def _values(amounts: _Amounts) -> list[int]:
    return list(vars(amounts).values())


@dataclass(frozen=True)
class _Measured:
    whole: _Amounts
    last_layer: _Amounts
    records: list[Record]


def _measure(group: Group, job: Job) -> _Measured:
    model = Transformer(job.args, group=group, sequence_parallel=job.sequence_parallel, dtype=job.dtype, device="meta")
    last, ids = model.layers[-1], torch.zeros(job.batch_size, job.seq_len, dtype=torch.long, device="meta")
    saved = SavedBytes(model)
    in_last: list[int] = []
    for register in (last.register_forward_pre_hook, last.register_forward_hook):
        register(lambda *_: in_last.append(saved.total))
    with Ledger() as ledger:
        with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            loss = vocab_parallel_cross_entropy(model(ids), ids, group=group, vocab_size=job.args.vocab_size)
        loss.backward()
    with model.evaluating(whole_sequences=True):
        model(ids[:, :1])  # allocates the KV cache
    whole = {place.name: _size(place.parameter, place.dim, place.size) for place in placements(model, group=group)}
    last_prefix = f"layers.{len(model.layers) - 1}."
    in_last_layer = {name: size for name, size in whole.items() if name.startswith(last_prefix)}
    return _Measured(
        _amounts(model, sum(whole.values()), saved.total),
        _amounts(last, sum(in_last_layer.values()), in_last[1] - in_last[0]),
        ledger.records,
    )


def _size(parameter: nn.Parameter, dim: int | None, size: int) -> int:
    """Elements of the unsharded parameter."""
    return parameter.numel() if dim is None else parameter.numel() // parameter.shape[dim] * size


def _amounts(module: nn.Module, all_parameters: int, activations: int) -> _Amounts:
    parameters = list(module.parameters())
    caches = [buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2] in ("cache_k", "cache_v")]
    return _Amounts(
        parameters=sum(p.numel() for p in parameters),
        all_parameters=all_parameters,
        weights=sum(p.nbytes for p in parameters),
        gradients=sum(p.grad.nbytes for p in parameters if p.grad is not None),
        activations=activations,
        kv_cache=sum(cache.nbytes for cache in caches),
    )


class SavedBytes:
    """The bytes that autograd keeps for backward: each storage once, parameters not at all."""

    def __init__(self, model: nn.Module) -> None:
        # A storage on the meta device has no address; storages are kept, so that no other takes the number of one.
        self._seen: dict[int, Any] = {_identity(p): p.untyped_storage() for p in model.parameters()}
        self.total = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Count ``tensor``; a pack hook of ``torch.autograd.graph.saved_tensors_hooks``."""
        if _identity(tensor) not in self._seen:
            self._seen[_identity(tensor)] = tensor.untyped_storage()
            self.total += tensor.untyped_storage().nbytes()
        return tensor


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class FusedAttention(TorchFunctionMode):
    """Gives attention on the meta device the memory of a fused kernel: torch takes the one that keeps all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs or {})
        return _Fused.apply(*args, (kwargs or {}).get("attn_mask"))  # type: ignore[no-untyped-call]


class _Fused(torch.autograd.Function):
    """What FlashAttention-2 (Dao 2023) keeps: inputs, output, and a float32 per head and query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # A kernel lays its output out as [b, s, heads, hd], which the caller wants next.
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        log_sum_exp = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        ctx.save_for_backward(q, k, v, out, log_sum_exp, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def repeat_layer(records: Sequence[Record], layer: int, times: int) -> list[Record]:
    """``records`` of a model whose last layer is ``layer``, as if ``times`` layers like it followed.

    Forward they come behind it, in backward before it.
    """
    prefix = f"layers.{layer}"
    mine = [i for i, r in enumerate(records) if r.module == prefix or r.module.startswith(f"{prefix}.")]
    forward, backward = ([i for i in mine if records[i].phase == phase] for phase in ("forward", "backward"))
    end = forward[-1] + 1 if forward else 0
    start = backward[0] if backward else end

    def moved(index: int, by: int) -> Record:
        record = records[index]
        return replace(record, module=f"layers.{layer + by}{record.module.removeprefix(prefix)}")

    behind = [moved(i, by) for by in range(1, times + 1) for i in forward]
    before = [moved(i, by) for by in range(times, 0, -1) for i in backward]
    return [*records[:end], *behind, *records[end:start], *before, *records[start:]]
