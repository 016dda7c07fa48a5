"""The main job: three ways to run it, resuming, and what it says to bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import convert, generate
from scripts.mesh import Mesh
from scripts.train import main
from src import Group
from src.distributed import long_wait
from src.distributed.failure import timeout_of
from src.testing import Ranks

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--vocab-size", "300", "--layers", "1", "--dim", "32", "--multiple-of", "32", "--seq-len", "24",
    "--batch-size", "4", "--eval-batches", "2", "--eval-every", "4", "--save-every", "4", "--new-tokens", "6",
]  # fmt: skip


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400)))
    return [*SMALL, "--data", str(text), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]


def metrics(out: Path, kind: str) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == kind}


def test_a_run_learns_and_leaves_everything(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = ("--loss-block-tokens", "40")
    main([*arguments, "--simulate", "2", "--steps", "12", "--warmup", "2", "--accumulate", "2", *blocks])
    out = tmp_path / "run"
    validation = metrics(out, "validation")
    assert list(validation) == [0, 4, 8, 12]
    assert validation[12] < validation[0] - 1
    assert list(metrics(out, "train")) == list(range(1, 13))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "config.json").read_text())["model"]["dim"] == 32
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    shown = capsys.readouterr().out
    assert re.search(r"validation loss \d\.\d+ -> \d\.\d+ nats per token \(.* bits per byte\), \d+ tokens/s", shown)
    assert "sample, 6 tokens" in shown and "import os" in shown


@pytest.mark.parametrize("ways", [("1", "1"), ("4", "2")], ids=["same size", "other size"])
def test_resuming_continues_the_same_run(
    tmp_path: Path, arguments: list[str], ways: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = ["--num-shards", "4", "--warmup", "2", "--dropout", "0.1", "--sequence-parallel"]
    main([*arguments, *shards, "--simulate", "2", "--steps", "8", "--out", str(tmp_path / "whole")])
    main([*arguments, *shards, "--simulate", ways[0], "--steps", "8", "--save-every", "5", "--resume"])
    newest = tmp_path / "run" / "checkpoints" / "step-000008"
    newest.rename(tmp_path / "gone")
    main([*arguments, *shards, "--simulate", ways[1], "--steps", "8", "--resume"])
    assert newest.exists()
    for kind in ("train", "validation"):
        assert metrics(tmp_path / "run", kind) == metrics(tmp_path / "whole", kind)
    whole, _, resumed = re.findall(r"^digest ([0-9a-f]{64}) threads 1$", capsys.readouterr().out, re.MULTILINE)
    assert resumed == whole


def test_torchrun_gives_the_bits_of_simulation(tmp_path: Path, arguments: list[str]) -> None:
    main([*arguments, "--simulate", "2", "--steps", "4", "--threads", "1", "--out", str(tmp_path / "simulated")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "scripts.train", *arguments, "--steps", "4", "--device", "cpu", "--threads", "1"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    for kind in ("train", "validation"):
        assert metrics(tmp_path / "run", kind) == metrics(tmp_path / "simulated", kind)


@pytest.mark.parametrize("simulate", [[], ["--simulate", "2"]], ids=["single", "simulated"])
def test_bad_input_ends_with_one_sentence(tmp_path: Path, arguments: list[str], simulate: list[str]) -> None:
    def error(*more: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *simulate, *more, "--steps", "2"])
        return str(ended.value)

    empty = tmp_path / "empty.txt"
    empty.touch()
    assert re.match(r"error: found no text in data=.*empty\.txt", error("--data", str(empty)))
    assert "vocab_size=100 is too small" in error("--vocab-size", "100")
    assert "too few for one sequence of seq_len=99999" in error("--seq-len", "99999")
    main([*arguments, *simulate, "--steps", "2"])
    assert "holds a run already; pass --resume" in error()
    assert "of another run: its n_layers is 1, here it is 2" in error("--resume", "--layers", "2")
    assert "of another run: its n_heads is 8, here it is 4" in error("--resume", "--heads", "4")
    other = tmp_path / "other.txt"
    other.write_text("x = 1\n" * 3000)
    assert re.search("of another run: its (vocab_size|text) is", error("--resume", "--data", str(other)))
    damaged = tmp_path / "run" / "checkpoints" / "step-000002" / ".metadata"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "is damaged: .metadata" in error("--resume")


def test_the_digest_is_the_last_line_and_the_same_at_every_size(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    last = []
    for n in (1, 2, 8):
        main(
            [*arguments, "--num-shards", "8", "--simulate", str(n), "--steps", "3", "--out", str(tmp_path / f"run{n}")]
        )
        last.append(capsys.readouterr().out.splitlines()[-1])
    assert re.fullmatch(r"digest [0-9a-f]{64} threads 1", last[0]) and len(set(last)) == 1


@pytest.mark.parametrize(
    "option, message",
    [
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--prompt", ""], "--prompt must not be empty"),
        (["--heads", "7"], "--dim 32 cannot be cut into --heads 7 of an even width; choose a multiple of 14"),
        (["--heads", "32"], "--dim 32 cannot be cut into --heads 32 of an even width; choose a multiple of 64"),
        (["--heads", "0"], "--heads must be at least 1, not 0"),
    ],
)
def test_options_that_make_no_sense(
    arguments: list[str], capsys: pytest.CaptureFixture[str], option: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, *option])
    assert message in capsys.readouterr().err


def test_a_prompt_longer_than_the_model_sees(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*arguments, "--steps", "1", "--prompt", "def f(x): return x\n" * 20, "--new-tokens", "99"])
    assert "sample, 23 tokens after the prompt" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_data_parallel_ranks_share_the_batch(tmp_path: Path, arguments: list[str], mode: str) -> None:
    more = ["--steps", "8", "--warmup", "2", "--accumulate", "2", "--kv-heads", "1"]
    main([*arguments, *more, "--simulate", "2", "--out", str(tmp_path / "whole")])
    main([*arguments, *more, "--simulate", "4", "--dp", "2", "--dp-mode", mode])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000008")
    main([*arguments, *more, "--simulate", "2", "--dp", "2", "--dp-mode", mode, "--resume"])
    for kind in ("train", "validation"):
        assert metrics(tmp_path / "run", kind) == pytest.approx(metrics(tmp_path / "whole", kind), rel=1e-4)


@pytest.mark.slow
def test_data_parallel_processes(tmp_path: Path, arguments: list[str]) -> None:
    more = ["--steps", "4", "--dp", "2", "--dp-mode", "fsdp", "--device", "cpu", "--threads", "1"]
    main([*arguments, *more, "--simulate", "4", "--out", str(tmp_path / "simulated")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["-m", "scripts.train", *arguments, *more]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert finished.returncode == 0, finished.stderr
    for kind in ("train", "validation"):
        assert metrics(tmp_path / "run", kind) == metrics(tmp_path / "simulated", kind)


def test_data_parallel_sizes_that_do_not_fit(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in [
        (["--simulate", "4", "--dp", "3"], r"--dp 3 does not divide the number of ranks, 4"),
        (["--simulate", "6", "--dp", "3"], r"--batch-size 4 cannot be split over --dp 3"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main([*arguments, *options])
    with pytest.raises(SystemExit):
        main([*arguments, "--simulate", "4", "--dp", "2", "--num-shards", "4"])
    assert "a sum over --dp 2 changes" in capsys.readouterr().err


def timeouts(group: Group) -> list[float]:
    with long_wait(group, 77):
        mesh = Mesh.arrange(group, 2, 4, torch.device("cpu"))
    return [timeout_of(each.pg).total_seconds() for each in (mesh.tp, mesh.dp)]


def test_groups_of_the_mesh_wait_as_long_as_all_ranks(ranks: Ranks) -> None:
    assert ranks.on("gloo", 4)(timeouts) == [[77, 77]] * 4


@pytest.mark.parametrize("kind", ["checkpoint", "hugging-face", "meta"])
def test_training_goes_on_from_another_format(tmp_path: Path, arguments: list[str], kind: str) -> None:
    """At another number of ranks, with the model's own tokenizer: where the first run ended the second begins."""
    main([*arguments, "--simulate", "2", "--steps", "4", "--warmup", "2"])
    model = tmp_path / "run/checkpoints/step-000004"
    if kind != "checkpoint":
        convert.main([str(model), str(tmp_path / "model"), "--to", kind])
        model = tmp_path / "model"
    second = [*arguments, "--out", str(tmp_path / "second"), "--model", str(model), "--layers", "7"]
    main([*second, "--simulate", "4", "--steps", "8", "--warmup", "2"])
    ended, begun = metrics(tmp_path / "run", "validation"), metrics(tmp_path / "second", "validation")
    assert begun[0] == pytest.approx(ended[4], abs=1e-5) and begun[8] < begun[0] - 0.3
    files = [
        tmp_path / run / name for run in ("run", "second") for name in ("tokenizer.json", "generation_config.json")
    ]
    assert files[0].read_bytes() == files[2].read_bytes() and files[1].read_text() == files[3].read_text()
    convert.main([str(tmp_path / "second/checkpoints/step-000008"), str(tmp_path / "back"), "--to", "hugging-face"])
    generate.main(["--model", str(tmp_path / "back"), "--prompt", "def", "--simulate", "2", "--max-new-tokens", "3"])


def test_a_model_to_start_from_must_be_a_llama(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit, match=r"model_type='gpt2' of this config\.json is not supported, only 'llama' is"):
        main([*arguments, "--model", str(tmp_path)])


def test_a_model_to_start_from_must_be_complete(tmp_path: Path, arguments: list[str]) -> None:
    main([*arguments, "--simulate", "1", "--steps", "1"])
    for missing, message in (("generation_config.json", "no end of text"), ("tokenizer.json", "no tokenizer.json")):
        (tmp_path / "run" / missing).unlink()
        with pytest.raises(SystemExit, match=message):
            checkpoint = str(tmp_path / "run/checkpoints/step-000001")
            main([*arguments, "--simulate", "1", "--model", checkpoint, "--out", str(tmp_path / "second")])
