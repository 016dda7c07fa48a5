"""Tensor parallelism inside data parallelism: DistributedDataParallel and FSDP2 on a mesh of dp x tp ranks.

The reference is one process with an unsharded model, torch's own clipping, and the whole batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from src import Group
from src.checkpoint import load, save
from src.distributed import all_reduce
from src.modeling import ModelArgs, Transformer
from src.modeling.parameters import placements
from src.testing import Ranks
from src.training import batch_loss, evaluate, train_step
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


def build(job: Job, mesh: Any, tp: Group, seed: int = 42) -> nn.Module:
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
        return DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    return model


def batches(step: int, dp: int = 1, rank: int = 0) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of the micro-batches of a step."""
    ids = torch.randint(
        0, ARGS.vocab_size, (MICRO_BATCHES, SEQUENCES, 9), generator=torch.Generator().manual_seed(step)
    )
    parts = [micro.chunk(dp)[rank] for micro in ids]
    return [(part[:, :-1], part[:, 1:]) for part in parts]


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def train(group: Group, job: Job) -> dict[str, Any]:
    mesh = mesh_of(group, job.dp)
    tp, dp = Group(mesh["tp"]), Group(mesh["dp"])
    model = build(job, mesh, tp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    found: dict[str, Any] = {"first": copies(unsharded_weights(model, group=tp)), "losses": [], "norms": []}
    dtype = torch.bfloat16 if job.dtype == torch.bfloat16 else torch.float32
    for step in range(STEPS):
        data = batches(step, dp.world_size, dp.rank)
        result = train_step(model, optimizer, data, group=tp, max_norm=MAX_NORM, dtype=dtype)
        found["losses"].append((all_reduce(result.loss, group=dp) / dp.world_size).item())
        found["norms"].append(result.grad_norm.item())
        if step == 0:
            found["clipped"] = copies(unsharded_gradients(model, group=tp))
    assert audit_gradients(model, group=tp) == []
    return found | {"last": copies(unsharded_weights(model, group=tp))}


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
            found["clipped"] = copies({name: p.grad for name, p in model.named_parameters()})
        optimizer.step()
        found["losses"].append(loss.item())
    return found | {"last": dict(model.named_parameters())}


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


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, tp: Group) -> dict[str, Tensor]:
    """Weights and optimizer state, whole."""
    out = {}
    for place in placements(model, group=tp):
        state = optimizer.state[place.parameter]
        assert state["step"].item() == STEPS
        for key, value in {"weight": place.parameter.detach(), **state}.items():
            out[f"{place.name} {key}"] = value.clone() if key == "step" else place.whole(value, tp).clone()
    return out


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, tp: Group, dp: Group) -> list[float]:
    losses = []
    for step in range(STEPS, STEPS + 2):
        result = train_step(model, optimizer, batches(step, dp.world_size, dp.rank), group=tp, max_norm=MAX_NORM)
        losses.append((all_reduce(result.loss, group=dp) / dp.world_size).item())
    return losses


def write(group: Group, job: Job, path: Path) -> tuple[dict[str, Tensor], list[float]]:
    mesh = mesh_of(group, job.dp)
    tp, dp = Group(mesh["tp"]), Group(mesh["dp"])
    model = build(job, mesh, tp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for step in range(STEPS):
        train_step(model, optimizer, batches(step, dp.world_size, dp.rank), group=tp, max_norm=MAX_NORM)
    evaluate(model, batches(0), group=tp)  # leaves the outermost parameters of FSDP2 whole
    save(path, model, optimizer, {"step": STEPS}, group=tp, world=group)
    return everything(model, optimizer, tp), go_on(model, optimizer, tp, dp)


def read(group: Group, job: Job, path: Path) -> tuple[dict[str, Tensor], list[float]]:
    mesh = mesh_of(group, job.dp)
    tp, dp = Group(mesh["tp"]), Group(mesh["dp"])
    model = build(job, mesh, tp, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    assert load(path, model, optimizer, group=tp, world=group) == {"step": STEPS}
    return everything(model, optimizer, tp), go_on(model, optimizer, tp, dp)


READERS = {
    "plain": (("simulated", 1), "plain", 1),
    "tp 4": (("simulated", 4), "plain", 1),
    "ddp 2x2": (("simulated", 4), "ddp", 2),
    "fsdp 3x2": (("simulated", 6), "fsdp", 3),
    "fsdp 2x1": (("simulated", 2), "fsdp", 2),
    "fsdp 2x2 gloo": (("gloo", 4), "fsdp", 2),
}


@pytest.mark.parametrize("args", [ARGS, TIED], ids=["one kv head", "tied"])
@pytest.mark.parametrize("writer", ["plain", "ddp 2x2", "fsdp 3x2", "fsdp 2x2 gloo"])
def test_checkpoints_fit_every_mesh(ranks: Ranks, tmp_path: Path, writer: str, args: ModelArgs) -> None:
    place, mode, dp = READERS[writer]
    (saved, losses), *others = ranks.on(*place)(write, Job(mode, dp, args), tmp_path / "c")
    metadata = FileSystemReader(tmp_path / "c").read_metadata()
    on_disk = sum(file.stat().st_size for file in (tmp_path / "c").glob("*.distcp"))
    assert on_disk == sum(piece.length for piece in metadata.storage_data.values())
    for name, (reading, how, width) in READERS.items():
        results = ranks.on(*reading)(read, Job(how, width, args), tmp_path / "c")
        for got, next_losses in [*results, *others]:
            assert got.keys() == saved.keys()
            assert [key for key in saved if not torch.equal(got[key], saved[key])] == [], name
            assert next_losses == pytest.approx(losses, rel=1e-6)
