"""Tensor parallelism inside data parallelism: DistributedDataParallel and FSDP2 on a mesh of dp x tp ranks.

The reference is one process with an unsharded model, torch's own clipping, and the whole batch.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from src import Group, Ledger
from src.checkpoint import load, save, sharded_state_dict
from src.distributed import all_reduce
from src.modeling import ModelArgs, Transformer
from src.modeling.parameters import placements
from src.testing import Ranks
from src.training import batch_loss, clip_grad_norm_, evaluate, train_step
from src.verification import audit_gradients, unsharded_gradients, unsharded_weights

ARGS = ModelArgs(
    dim=32, n_layers=2, n_heads=8, n_kv_heads=1, vocab_size=51, multiple_of=32, max_seq_len=16, pad_vocab=True
)  # 51 rows are padded, and the one kv head is shared by all ranks
TIED = replace(ARGS, tie_embeddings=True, n_kv_heads=2)
STEPS, MICRO_BATCHES, SEQUENCES, MAX_NORM, LR = 3, 2, 12, 0.5, 1e-2


slow = pytest.mark.slow
PLACES = [
    (("gloo", 4), 2),
    (("simulated", 6), 3),
    *(pytest.param(("simulated", n), 2, marks=slow) for n in (4, 8, 2)),
]


def recompute(layer: nn.Module) -> None:
    """Activations inside ``layer`` are computed again in backward."""
    forward = layer.forward
    layer.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)


@dataclass(frozen=True)
class Job:
    """How the model is wrapped and trained."""

    mode: str
    dp: int
    args: ModelArgs = field(default_factory=lambda: ARGS)
    recompute: bool = False
    sequence_parallel: bool = False
    autocast: bool = False
    compiled: bool = False

    def meshes(self, group: Group) -> tuple[Group, Group, Any]:
        """The tensor-parallel and the data-parallel group of this rank, and the mesh for ``fully_shard``."""
        shape = (self.dp, group.world_size // self.dp)
        mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        if self.mode == "hsdp":
            axes = ("copies", "shards", "tp")
            hybrid = dist.init_device_mesh("cpu", (2, shape[0] // 2, shape[1]), mesh_dim_names=axes)
            return Group(mesh["tp"]), Group(mesh["dp"]), hybrid["copies", "shards"]
        return Group(mesh["tp"]), Group(mesh["dp"]), mesh["dp"]

    def build(self, tp: Group, mesh: Any, seed: int = 42) -> nn.Module:
        dtype = torch.float32 if self.autocast else torch.float64
        model = Transformer(self.args, group=tp, seed=seed, dtype=dtype, sequence_parallel=self.sequence_parallel)
        for layer in model.layers:
            if self.recompute:
                recompute(layer)
            if self.compiled:
                layer.compile(fullgraph=True, backend="aot_eager")
            if self.mode in ("fsdp", "hsdp"):
                fully_shard(layer, mesh=mesh)
        if self.mode in ("fsdp", "hsdp"):
            fully_shard(model, mesh=mesh)
        return DistributedDataParallel(model, process_group=mesh.get_group()) if self.mode == "ddp" else model

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else torch.float32


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
    tp, dp, mesh = job.meshes(group)
    model = job.build(tp, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    found: dict[str, Any] = {"first": copies(unsharded_weights(model, group=tp)), "losses": [], "norms": []}
    for step in range(STEPS):
        data = batches(step, dp.world_size, dp.rank)
        result = train_step(model, optimizer, data, group=tp, max_norm=MAX_NORM, dtype=job.dtype)
        found["losses"].append((all_reduce(result.loss, group=dp) / dp.world_size).item())
        found["norms"].append(result.grad_norm.item())
        if step == 0:
            found["clipped"] = copies(unsharded_gradients(model, group=tp))
    assert audit_gradients(model, group=tp) == []
    return found | {"last": copies(unsharded_weights(model, group=tp))}


def train_plain(job: Job, first: dict[str, Tensor]) -> dict[str, Any]:
    """One process, nothing sharded, the whole batch, torch's own clipping."""
    group = Group.single()
    model = replace(job, mode="plain", recompute=False, sequence_parallel=False).build(group, None)
    model.load_state_dict(first, strict=not job.args.tie_embeddings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum(batch_loss(model, *batch, group=group, dtype=job.dtype) for batch in batches(step)) / MICRO_BATCHES
        loss.backward()
        found["norms"].append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        if step == 0:
            found["clipped"] = copies({name: p.grad for name, p in model.named_parameters()})
        optimizer.step()
        found["losses"].append(loss.item())
    return found | {"last": dict(model.named_parameters())}


def check(results: list[dict[str, Any]], job: Job) -> None:
    want = train_plain(job, results[0]["first"])
    for got in results:
        assert got["losses"] == pytest.approx(want["losses"], rel=5e-3 if job.autocast else 1e-9)
        assert got["norms"] == pytest.approx(want["norms"], rel=2e-2 if job.autocast else 1e-9)
        tolerance = {"rtol": 0.0, "atol": 5e-3} if job.autocast else {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(got["clipped"], want["clipped"], **tolerance)
        if not job.autocast:  # AdamW divides by the gradient: where that is rounding alone, its sign decides
            torch.testing.assert_close(got["last"], want["last"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("args", [ARGS, pytest.param(TIED, marks=slow)], ids=["one kv head", "tied"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("place, dp", PLACES, ids=["2x2 gloo", "3x2 uneven", "2x2", "2x4", "2x1"])
def test_training_is_that_of_one_process(ranks: Ranks, place: Any, dp: int, mode: str, args: ModelArgs) -> None:
    job = Job(mode, dp, args)
    check(ranks.on(*place)(train, job), job)


@pytest.mark.parametrize("place", [("gloo", 4), pytest.param(("simulated", 4), marks=slow)], ids=["gloo", "simulated"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"recompute": True}, marks=slow),
        {"recompute": True, "sequence_parallel": True, "autocast": True},
        pytest.param({"compiled": True}, marks=slow),
        pytest.param({"compiled": True, "recompute": True, "sequence_parallel": True}, marks=slow),
    ],
    ids=lambda options: " ".join(options),
)
def test_composed_with_the_rest(ranks: Ranks, place: Any, mode: str, options: dict[str, bool]) -> None:
    job = Job(mode, 2, **options)
    check(ranks.on(*place)(train, job), job)


def test_hybrid_sharding(ranks: Ranks) -> None:
    job = Job("hsdp", 4, TIED)
    check(ranks.on("simulated", 8)(train, job), job)


@pytest.mark.ranks(4, gloo=())
def test_clipping_sends_squares_alone(group: Group) -> None:
    tp, dp, mesh = Job("fsdp", 2).meshes(group)
    model = Job("fsdp", 2).build(tp, mesh)
    data = batches(0, 2, dp.rank)
    batch_loss(model, *data[0], group=tp).backward()
    want = clip_grad_norm_(model, math.inf, group=tp)
    evaluate(model, data, group=tp)  # leaves the outermost parameters whole, without their gradients
    with Ledger() as ledger:
        assert torch.equal(clip_grad_norm_(model, MAX_NORM, group=tp), want)
    assert [(record.op, record.shape) for record in ledger.records] == [("all_reduce", (2,)), ("all_gather", (1,))]


@pytest.mark.ranks(4)
def test_clipping_where_a_part_is_left_to_itself(group: Group) -> None:
    """Of two blocks FSDP2 has one; the gradients of the other are the same on all data-parallel ranks."""
    tp, _, mesh = Job("plain", 2).meshes(group)
    model = Job("plain", 2).build(tp, None)
    twin = Job("plain", 2).build(tp, None)
    fully_shard(model.layers[0], mesh=mesh)
    ids, targets = batches(0)[0]
    for each in (model, twin):
        batch_loss(each, ids, targets, group=tp).backward()
    norms = [clip_grad_norm_(each, MAX_NORM, group=tp) for each in (model, twin)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-9, atol=0)
    got, want = (unsharded_gradients(each, group=tp) for each in (model, twin))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.ranks(4)
def test_gradients_wait_for_the_last_micro_batch(group: Group) -> None:
    tp, dp, mesh = Job("ddp", 2).meshes(group)
    model, sent, data = Job("ddp", 2).build(tp, mesh), [], batches(0, 2, dp.rank)

    def send(state, bucket):  # torch compares annotations, and takes no strings
        sent.append(bucket.index())
        return default_hooks.allreduce_hook(dp.pg, bucket)

    model.register_comm_hook(None, send)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), data, group=tp)
    assert len(data) == 2 and sent == [0]

    model, there = Job("fsdp", 2).build(tp, mesh), []
    slices = list(model.parameters())
    model.register_forward_pre_hook(lambda *_: there.append(any(p.grad is not None for p in slices)))
    train_step(model, torch.optim.SGD(slices, lr=0.1), data, group=tp)
    assert there == [False, False] and all(p.grad is not None for p in slices)


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
    tp, dp, mesh = job.meshes(group)
    model = job.build(tp, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for step in range(STEPS):
        train_step(model, optimizer, batches(step, dp.world_size, dp.rank), group=tp, max_norm=MAX_NORM)
    evaluate(model, batches(0), group=tp)
    save(path, model, optimizer, {"step": STEPS}, group=tp, world=group)
    return everything(model, optimizer, tp), go_on(model, optimizer, tp, dp)


def read(group: Group, job: Job, path: Path) -> tuple[dict[str, Tensor], list[float]]:
    tp, dp, mesh = job.meshes(group)
    model = job.build(tp, mesh, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    assert load(path, model, optimizer, group=tp, world=group) == {"step": STEPS}
    return everything(model, optimizer, tp), go_on(model, optimizer, tp, dp)


MESHES = {
    "plain": (("simulated", 1), "plain", 1),
    "tp 4": (("simulated", 4), "plain", 1),
    "ddp 2x2": (("simulated", 4), "ddp", 2),
    "fsdp 3x2": (("simulated", 6), "fsdp", 3),
    "fsdp 2x1": (("simulated", 2), "fsdp", 2),
    "fsdp 2x2 gloo": (("gloo", 4), "fsdp", 2),
}


@pytest.mark.parametrize("args", [ARGS, pytest.param(TIED, marks=slow)], ids=["one kv head", "tied"])
@pytest.mark.parametrize(
    "writer, readers",
    [
        ("fsdp 3x2", ["plain", "fsdp 2x2 gloo"]),
        ("ddp 2x2", ["fsdp 3x2"]),
        pytest.param("plain", list(MESHES), marks=slow),
        pytest.param("ddp 2x2", list(MESHES), marks=slow),
        pytest.param("fsdp 3x2", list(MESHES), marks=slow),
        pytest.param("fsdp 2x2 gloo", list(MESHES), marks=slow),
    ],
)
def test_checkpoints_fit_every_mesh(
    ranks: Ranks, tmp_path: Path, writer: str, readers: list[str], args: ModelArgs
) -> None:
    place, mode, dp = MESHES[writer]
    (saved, losses), *others = ranks.on(*place)(write, Job(mode, dp, args), tmp_path / "c")
    metadata = FileSystemReader(tmp_path / "c").read_metadata()
    on_disk = sum(file.stat().st_size for file in (tmp_path / "c").glob("*.distcp"))
    assert on_disk == sum(piece.length for piece in metadata.storage_data.values())
    for name in readers:
        place, mode, dp = MESHES[name]
        results = ranks.on(*place)(read, Job(mode, dp, args), tmp_path / "c")
        for got, next_losses in [*results, *others]:
            assert got.keys() == saved.keys()
            assert [key for key in saved if not torch.equal(got[key], saved[key])] == [], name
            assert next_losses == pytest.approx(losses, rel=1e-9)


def test_simulated_and_real_ranks_write_the_same(ranks: Ranks, tmp_path: Path) -> None:
    job, found = Job("plain", 1), {}
    for backend in ("simulated", "gloo"):
        saved = ranks.on(backend, 2)(write, job, tmp_path / backend)
        metadata = FileSystemReader(tmp_path / backend).read_metadata()
        found[backend] = saved, metadata.state_dict_metadata
    assert found["simulated"][1] == found["gloo"][1]
    for writer, reader in (("simulated", "gloo"), ("gloo", "simulated")):
        for (want, losses), (got, next_losses) in zip(
            found[writer][0], ranks.on(reader, 2)(read, job, tmp_path / writer), strict=True
        ):
            assert [key for key in want if not torch.equal(got[key], want[key])] == []
            assert next_losses == losses


def save_and_load_with_torch(group: Group, path: Path) -> None:
    job = Job("fsdp", 2)
    tp, _, mesh = job.meshes(group)
    models = [job.build(tp, mesh, seed) for seed in (1, 2)]
    dcp.save(sharded_state_dict(models[0], group=tp), checkpoint_id=path)
    dcp.load(sharded_state_dict(models[1], group=tp), checkpoint_id=path)
    first, second = (unsharded_weights(model, group=tp) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("place", [("simulated", 4), ("gloo", 4)], ids=["simulated", "gloo"])
def test_torch_reads_and_writes_the_state_dict(ranks: Ranks, tmp_path: Path, place: Any) -> None:
    ranks.on(*place)(save_and_load_with_torch, tmp_path / "c")


@pytest.mark.ranks(4)
def test_a_job_with_more_ranks_must_be_named(group: Group, tmp_path: Path) -> None:
    tp, _, mesh = Job("ddp", 2).meshes(group)
    model = Job("ddp", 2).build(tp, mesh)
    with pytest.raises(ValueError, match=r"group has world_size=2 of the 4 ranks of this job; pass world="):
        save(tmp_path / "c", model, group=tp)
    assert not list(tmp_path.iterdir())


@slow
@pytest.mark.parametrize("mode", ["plain", "ddp", "fsdp"])
def test_the_program_of_the_page(tmp_path: Path, mode: str) -> None:
    root = Path(__file__).resolve().parents[1]
    (tmp_path / "isoshard").symlink_to(root / "src", target_is_directory=True)
    program, printed = re.findall(r"```(?:python)?\n(.*?)```", (root / "docs/parallelisms.md").read_text(), re.DOTALL)[
        :2
    ]
    (tmp_path / "company.py").write_text(program)
    for mesh in (["4", mode, "2", "0", "3"], ["2", "ddp", "2", "3", "5"]):
        size, *arguments = ["2", mode, "1", "0", "3"] if mesh[1] == "plain" else mesh
        command = [sys.executable, "-m", "isoshard", "run", "--simulate", size, "company.py", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
        shown = done.stdout.replace("[rank0]: ", "")
        assert shown.count("step") == int(arguments[3]) - int(arguments[2]) and shown in printed, done.stderr
