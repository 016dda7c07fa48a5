"""Tensor parallelism inside data parallelism: DistributedDataParallel and FSDP2 on a mesh of dp x tp ranks.

The reference is one process with an unsharded model, torch's own clipping, and the whole batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from src import Group
from src.distributed import all_reduce
from src.modeling import ModelArgs, Transformer
from src.testing import Ranks
from src.training import batch_loss, train_step
from src.verification import audit_gradients, unsharded_gradients, unsharded_weights

ARGS = ModelArgs(
    dim=32, n_layers=2, n_heads=8, n_kv_heads=1, vocab_size=51, multiple_of=32, max_seq_len=16, pad_vocab=True
)  # 51 rows are padded, and the one kv head is shared by all ranks
TIED = replace(ARGS, tie_embeddings=True, n_kv_heads=2)
STEPS, MICRO_BATCHES, SEQUENCES, MAX_NORM, LR = 3, 2, 12, 0.5, 1e-2


@dataclass(frozen=True)
class Job:
    """How the model is wrapped and trained."""

    mode: str
    dp: int
    args: ModelArgs = field(default_factory=lambda: ARGS)
    recompute: bool = False
    dtype: torch.dtype = torch.float64


def mesh_of(group: Group, dp: int) -> Any:
    return dist.init_device_mesh("cpu", (dp, group.world_size // dp), mesh_dim_names=("dp", "tp"))


def build(job: Job, mesh: Any, tp: Group, seed: int = 42) -> tuple[Transformer, nn.Module]:
    """The model, and what is called in its place."""
    dtype = torch.float32 if job.dtype == torch.bfloat16 else job.dtype
    model = Transformer(job.args, group=tp, seed=seed, dtype=dtype)
    for layer in model.layers:
        if job.recompute:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        if job.mode == "fsdp":
            fully_shard(layer, mesh=mesh["dp"])
    if job.mode == "fsdp":
        fully_shard(model, mesh=mesh["dp"])
    if job.mode == "ddp":
        return model, DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    return model, model


def batches(step: int, dp: int = 1, rank: int = 0) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of the micro-batches of a step."""
    ids = torch.randint(
        0, ARGS.vocab_size, (MICRO_BATCHES, SEQUENCES, 9), generator=torch.Generator().manual_seed(step)
    )
    parts = [micro.chunk(dp)[rank] for micro in ids]
    return [(part[:, :-1], part[:, 1:]) for part in parts]


def train(group: Group, job: Job) -> dict[str, Any]:
    mesh = mesh_of(group, job.dp)
    tp, dp = Group(mesh["tp"]), Group(mesh["dp"])
    model, called = build(job, mesh, tp)
    optimizer = torch.optim.AdamW(called.parameters(), lr=LR)
    found: dict[str, Any] = {"first": unsharded_weights(model, group=tp), "losses": [], "norms": []}
    found["first"] = {name: value.clone() for name, value in found["first"].items()}
    dtype = torch.bfloat16 if job.dtype == torch.bfloat16 else torch.float32
    for step in range(STEPS):
        data = batches(step, dp.world_size, dp.rank)
        result = train_step(called, optimizer, data, group=tp, max_norm=MAX_NORM, dtype=dtype)
        found["losses"].append((all_reduce(result.loss, group=dp) / dp.world_size).item())
        found["norms"].append(result.grad_norm.item())
        if step == 0:
            found["clipped"] = {n: g.clone() for n, g in unsharded_gradients(called, group=tp).items()}
    assert audit_gradients(called, group=tp) == []
    return found | {"last": {name: value.clone() for name, value in unsharded_weights(called, group=tp).items()}}


def train_plain(job: Job, first: dict[str, Tensor]) -> dict[str, Any]:
    """One process, nothing sharded, the whole batch, torch's own clipping."""
    dtype = torch.float32 if job.dtype == torch.bfloat16 else job.dtype
    model = Transformer(job.args, dtype=dtype)
    model.load_state_dict(first, strict=not job.args.tie_embeddings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(batch_loss(model, *batch, group=Group.single()) for batch in batches(step)) / MICRO_BATCHES
        loss.backward()
        found["norms"].append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        if step == 0:
            found["clipped"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        found["losses"].append(loss.item())
    return found | {"last": {name: p.detach() for name, p in model.named_parameters()}}


def check(results: list[dict[str, Any]], job: Job, rtol: float = 1e-6) -> None:
    want = train_plain(job, results[0]["first"])
    for got in results:
        assert got["losses"] == pytest.approx(want["losses"], rel=rtol)
        assert got["norms"] == pytest.approx(want["norms"], rel=rtol)
        for kind in ("clipped", "last"):
            torch.testing.assert_close(got[kind], want[kind], rtol=100 * rtol, atol=rtol)


@pytest.mark.parametrize("args", [ARGS, TIED], ids=["one kv head", "tied"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "place, dp",
    [(("simulated", 4), 2), (("simulated", 6), 3), (("simulated", 8), 2), (("simulated", 2), 2), (("gloo", 4), 2)],
    ids=["2x2", "3x2 uneven", "2x4", "2x1", "2x2 gloo"],
)
def test_training_is_that_of_one_process(ranks: Ranks, place: Any, dp: int, mode: str, args: ModelArgs) -> None:
    job = Job(mode, dp, args)
    check(ranks.on(*place)(train, job), job)
