"""What the layers are measured against; missing libraries are named, not needed."""

import importlib
from collections.abc import Callable
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Missing(Exception):
    """A peer that is not installed."""


def library(name: str) -> Any:
    """The module ``name``; raises Missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{error}; see scripts/bench/peers.sh") from error


def llama_rms_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """Transformers' norm with ``weight``."""
    norm = library("transformers.models.llama.modeling_llama").LlamaRMSNorm(len(weight), eps)
    norm.weight = torch.nn.Parameter(weight)
    call: Callable[[Tensor], Tensor] = norm
    return call


def llama_rotation() -> Callable[..., tuple[Tensor, Tensor]]:
    """Transformers' ``apply_rotary_pos_emb(q, k, cos, sin)``, heads before positions."""
    call: Callable[..., tuple[Tensor, Tensor]] = library(
        "transformers.models.llama.modeling_llama"
    ).apply_rotary_pos_emb
    return call


def grouped_rms_norm(x: Tensor, weight: Tensor, size: int, eps: float) -> Tensor:
    """Groups of channels by ``F.rms_norm``."""
    return F.rms_norm(x.unflatten(-1, (-1, size)), (size,), None, eps).flatten(-2) * weight


def megatron_embedding(ids: Tensor, table: Tensor, first: int) -> Tensor:
    """Forward of Megatron-Core 0.16.1's VocabParallelEmbedding up to its all-reduce."""
    mask = (ids < first) | (ids >= first + table.shape[0])
    masked = ids.clone() - first
    masked[mask] = 0
    rows = F.embedding(masked, table)
    rows[mask, :] = 0.0
    return rows


def dtensor_cross_entropy(logits: Tensor, targets: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward of torch's ``loss_parallel`` on sharded logits, in a group of one gloo process."""
    _alone()
    tensor, parallel = library("torch.distributed.tensor"), library("torch.distributed.tensor.parallel")
    mesh = library("torch.distributed.device_mesh").init_device_mesh("cpu", (1,))
    leaf = logits.detach().requires_grad_()
    sharded = tensor.DTensor.from_local(leaf, mesh, [tensor.Shard(-1)])

    def run() -> None:
        with parallel.loss_parallel():
            loss = F.cross_entropy(sharded, targets, reduction="none")
            loss.backward(tensor.DTensor.from_local(grad, mesh, [tensor.Replicate()]))
        leaf.grad = None

    return run


def _alone() -> None:
    """A default group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{mkdtemp()}/store")


def megatron_cross_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    """Megatron-Core's ``vocab_parallel_cross_entropy``, in a group of one gloo process; float32 logits are consumed."""
    state = library("megatron.core.parallel_state")
    _alone()
    if not state.model_parallel_is_initialized():
        state.initialize_model_parallel()
    call: Callable[[Tensor, Tensor], Tensor] = library("megatron.core.tensor_parallel").vocab_parallel_cross_entropy
    return call
