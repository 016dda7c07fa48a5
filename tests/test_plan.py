"""The plan of a model against published sizes, against full runs, and against what a real run keeps."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import planning
from scripts.plan import MODELS, main
from scripts.planning import Job, RankPlan, plan_rank
from src import Group, simulate
from src.modeling import ModelArgs, Transformer, columns, linear, vocab_parallel_cross_entropy

# https://huggingface.co/meta-llama: number of parameters in each model's safetensors.
PUBLISHED = {"llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3-405b": 405_853_388_800}
SMALL = ModelArgs(dim=32, n_layers=4, n_heads=8, n_kv_heads=2, vocab_size=64, multiple_of=16)
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "two": (2, {}),
    "shards": (2, {"num_shards": 4}),
    "shared kv heads": (4, {}),
    "sequence": (2, {"sequence_parallel": True}),
    "sequence, shards, shared kv heads": (2, {"sequence_parallel": True, "num_shards": 8}),
}


def job(args: ModelArgs = SMALL, dtype: torch.dtype = torch.float32, **options: Any) -> Job:
    return Job(args, batch_size=2, seq_len=16, dtype=dtype, **options)


def sizes_by_name(group: Group, args: ModelArgs) -> dict[str, int]:
    return {name: p.numel() for name, p in Transformer(args, group=group, device="meta").named_parameters()}


@pytest.mark.parametrize("model", MODELS)
def test_published_numbers_of_parameters(model: str) -> None:
    args = ModelArgs(**MODELS[model])
    first, second = simulate(sizes_by_name, 2, args)
    norms = sum(size for name, size in first.items() if "norm" in name)
    assert sum(first.values()) + sum(second.values()) - norms == PUBLISHED[model]
    plan = plan_rank(Job(args, 1, 8192, torch.bfloat16), 8)
    assert plan.all_parameters == PUBLISHED[model]
    assert plan.parameters == (PUBLISHED[model] - norms) // 8 + norms
    assert plan.memory["parameters"] == plan.memory["gradients"] == 2 * plan.parameters
    assert plan.memory["AdamW moments"] == 8 * plan.parameters


def everything(plan: RankPlan) -> list[Any]:
    return [plan.parameters, plan.all_parameters, plan.memory, plan.kv_cache, plan.ledger.records]


@pytest.mark.parametrize("way", WAYS)
def test_two_layers_tell_all_about_four(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    world_size, options = WAYS[way]
    told = plan_rank(job(**options), world_size)
    monkeypatch.setattr(planning, "SHALLOW", 4)
    assert everything(told) == everything(plan_rank(job(**options), world_size))


def kept_by_a_real_run(group: Group, planned: Job) -> int:
    """Bytes of storages that autograd keeps on the CPU, parameters aside."""
    args = ModelArgs(**vars(planned.args) | {"max_seq_len": planned.seq_len})
    options: dict[str, Any] = {"sequence_parallel": planned.sequence_parallel, "dtype": planned.dtype}
    model = Transformer(args, group=group, **options)
    ids = torch.arange(planned.batch_size * planned.seq_len).view(planned.batch_size, -1) % args.vocab_size
    kept: list[torch.UntypedStorage] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vocab_parallel_cross_entropy(model(ids), ids, group=group).backward()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    by_address = {storage.data_ptr(): storage.nbytes() for storage in kept}
    return sum(size for address, size in by_address.items() if address not in parameters)


@pytest.mark.parametrize("dtype, overlap", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("way", WAYS)
def test_activations_are_those_of_a_real_run(
    monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype, overlap: bool
) -> None:
    world_size, options = WAYS[way]
    planned = job(dtype=dtype, **options)
    sent = bytes_sent(plan_rank(planned, world_size)) if overlap else None
    if overlap:
        monkeypatch.setattr(columns, "MIN_BYTES", 0)
        monkeypatch.setattr(linear, "MIN_FLOPS", 0)
    real = simulate(kept_by_a_real_run, world_size, planned, num_shards=planned.num_shards)
    plan = plan_rank(planned, world_size)
    assert real == [plan.memory["activations"]] * world_size
    assert sent in (None, bytes_sent(plan))


def bytes_sent(plan: RankPlan) -> Counter[tuple[str, str]]:
    sent: Counter[tuple[str, str]] = Counter()
    for record in plan.ledger.records:
        sent[record.phase, record.op] += record.payload_bytes
    return sent


def test_memory_by_hand() -> None:
    # Per rank of 2, in a layer: wq, wo 32 x 16, wk, wv 4 x 32, w1, w2, w3 48 x 32, two norms of 32; vocabulary 32 x 32.
    number = 4 * (2 * 32 * 16 + 2 * 4 * 32 + 3 * 48 * 32 + 2 * 32) + 2 * 32 * 32 + 32
    plan = plan_rank(job(dtype=torch.bfloat16, master_weights=True), 2)
    activations = plan.memory.pop("activations")
    assert activations > 0
    assert plan.memory == {
        "parameters": 2 * number,
        "gradients": 2 * number,
        "AdamW moments": 8 * number,
        "master weights": 4 * number,
    }
    # Keys and values of 2 sequences, 16 positions, 1 of 2 heads of 4 channels, 2 bytes each, in 4 layers.
    assert plan.kv_cache == 4 * 2 * (2 * 16 * 1 * 4 * 2)


def test_a_padded_vocabulary_is_counted_without_padding() -> None:
    args = ModelArgs(**vars(SMALL) | {"vocab_size": 61, "pad_vocab": True, "n_layers": 1})
    assert plan_rank(job(args), 4).all_parameters == plan_rank(job(args), 1).all_parameters


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "charts" / "plan.png"
    main(["--model", "llama3-8b", "--tp", "4", "--seq-len", "64", "--num-shards", "4", "--out", str(chart)])
    shown = capsys.readouterr().out
    assert "llama3-8b: 8,030,261,248 parameters, 2,007,764,992 on each of 4 rank(s)" in shown
    assert "parameters                            3.7 GiB" in shown
    # 64 tokens of 4096 bfloat16 channels: 512 KiB in each of 32 layers, 1.5 times on the wire.
    (row,) = (line for line in shown.splitlines() if line.startswith("layers.0-31.attention") and "forward" in line)
    assert row.split()[2:] == ["all_reduce", "32", "16.0", "MiB", "24.0", "MiB"]
    assert "inside a node: 3.4 µs, 450 GB/s; across nodes: 9.6 µs, 50 GB/s" in shown
    assert "An estimate by the alpha-beta model, not a measurement" in shown
    for size in ("8", "64", "512"):
        assert f"  {size} GPUs: " in shown
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_one_rank_sends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tp", "1", "--seq-len", "16", "--num-shards", "1", "--out", str(tmp_path / "plan.png")])
    assert "estimate" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tp", "3"], "error: n_heads=32 cannot be sharded over"),
        (["--num-shards", "12"], "error: num_shards=12"),
        (["--node-ranks", "6"], "error: world_size=8 is not a multiple of the ranks=6"),
        (["--bandwidth", "0", "1"], "error: gigabytes_per_second=0.0 must be positive"),
    ],
)
def test_errors_are_one_sentence(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main([*options, "--seq-len", "16", "--out", str(tmp_path / "plan.png")])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tp", "0"], "--tp must be at least 1, not 0"),
        (["--master-weights", "--dtype", "float32"], "--master-weights are float32 copies"),
        (["--model", "llama4"], "invalid choice: 'llama4'"),
    ],
)
def test_options_that_make_no_sense(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"error: matplotlib is not installed; pip install -e '\.\[train\]'"):
        main(["--tp", "2", "--seq-len", "16", "--num-shards", "2", "--out", str(tmp_path / "plan.png")])


def test_help_comes_without_torch() -> None:
    program = (
        "import sys; from scripts.plan import parse_options; assert 'torch' not in sys.modules; parse_options(['-h'])"
    )
    root = Path(__file__).parent.parent
    shown = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert "python -m scripts.plan --model llama3-8b --tp 8" in shown.stdout
