"""The peer of simulation: a Llama-style training step by hand, of all ranks at once, in torch's LocalTensorMode.

Layers as Megatron-LM writes them, in plain torch: column and row linears between two conjugate collectives, a cut
vocabulary at both ends, cross-entropy with three all-reduces. LocalTensorMode is private to torch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from src.functional import rope_tables
from src.modeling import ModelArgs

from .peers import library


@contextmanager
def fake_group(world_size: int) -> Iterator[None]:
    """This process as rank 0 of a default group whose collectives return at once: torch's own "fake" backend."""
    store = library("torch.testing._internal.distributed.fake_pg").FakeStore()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=store)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def all_ranks(world_size: int) -> Iterator[Callable[[Sequence[Tensor]], Tensor]]:
    """Every rank's part of each operator, one after the other. Gives a function that makes one tensor of all ranks'."""
    mode = library("torch.distributed._local_tensor")
    with fake_group(world_size), mode.LocalTensorMode(world_size):
        yield lambda tensors: mode.LocalTensor(dict(enumerate(tensors)))


def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """In place where ``tensor`` is contiguous."""
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, op)
    return tensor


class _Copy(torch.autograd.Function):
    """Replicated to sharded work: identity, and an all-reduce of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce(grad)


class _Reduce(torch.autograd.Function):
    """Partial sums to replicated: an all-reduce, and identity for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _CrossEntropy(torch.autograd.Function):
    """Of ``logits [b, s, v/w]``, which are not changed, and ``targets [b, s]``: losses ``[b, s]``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: Tensor) -> Tensor:
        logits = logits - all_reduce(logits.max(-1).values, dist.ReduceOp.MAX).unsqueeze(-1)
        foreign, local = own_ids(targets, first, logits.shape[-1])
        predicted = all_reduce(logits.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(foreign, 0))
        exponentials = logits.exp_()
        total = all_reduce(exponentials.sum(-1))
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), foreign, local)
        return total.log() - predicted

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        probabilities, foreign, local = ctx.saved_tensors
        hits = foreign.logical_not().to(grad.dtype).neg().unsqueeze(-1)
        return probabilities.scatter_add_(-1, local.unsqueeze(-1), hits).mul_(grad.unsqueeze(-1)), None, None


def own_ids(ids: Tensor, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which ids lie outside of ``[first, first + count)``, and their rows in this rank's table, 0 for those."""
    foreign = (ids < first) | (ids >= first + count)
    return foreign, (ids - first).masked_fill(foreign, 0)


def copy(x: Tensor) -> Tensor:
    result: Tensor = _Copy.apply(x)  # type: ignore[no-untyped-call]
    return result


def reduce(x: Tensor) -> Tensor:
    result: Tensor = _Reduce.apply(x)  # type: ignore[no-untyped-call]
    return result


class Model:
    """Llama, halves rotated. ``weights`` are named as in our Transformer; a rank's table begins at row ``first``."""

    def __init__(self, args: ModelArgs, weights: Mapping[str, Tensor], first: Tensor) -> None:
        self.args, self.weights, self.first = args, weights, first
        self.cos, self.sin = rope_tables(args.max_seq_len, args.head_dim, args.rope_theta)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of ``ids [b, s]``."""
        table = self.weights["tok_embeddings.weight"]
        foreign, local = own_ids(ids, self.first, table.shape[0])
        h = reduce(F.embedding(local, table).masked_fill(foreign.unsqueeze(-1), 0))
        for i in range(self.args.n_layers):
            h = h + self._attention(i, self._norm(f"layers.{i}.attention_norm.weight", h))
            h = h + self._feed_forward(i, self._norm(f"layers.{i}.ffn_norm.weight", h))
        logits = F.linear(copy(self._norm("norm.weight", h)), self.weights["output.weight"])
        losses: Tensor = _CrossEntropy.apply(logits, targets, self.first)  # type: ignore[no-untyped-call]
        return losses.mean()

    def _attention(self, i: int, x: Tensor) -> Tensor:
        x = copy(x)
        wq, wk, wv, wo = (self.weights[f"layers.{i}.attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo"))
        q, k, v = (F.linear(x, w).unflatten(-1, (-1, self.args.head_dim)).transpose(1, 2) for w in (wq, wk, wv))
        heads = F.scaled_dot_product_attention(self._turn(q), self._turn(k), v, is_causal=True)
        return reduce(F.linear(heads.transpose(1, 2).flatten(-2), wo))

    def _feed_forward(self, i: int, x: Tensor) -> Tensor:
        x = copy(x)
        w1, w2, w3 = (self.weights[f"layers.{i}.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        return reduce(F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.args.dim,), self.weights[name], self.args.norm_eps)

    def _turn(self, x: Tensor) -> Tensor:
        length = x.shape[-2]
        one, other = x.chunk(2, -1)
        return x * self.cos[:length] + torch.cat((-other, one), -1) * self.sin[:length]
