"""Checkpoints: any world size reads what any other wrote, and nothing half-written or foreign is ever loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from src import Group
from src.checkpoint import load, read_info, save, sharded_state_dict
from src.modeling import ModelArgs, Transformer
from src.testing import Ranks
from src.training import train_step

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=8, vocab_size=51, multiple_of=32, max_seq_len=16, pad_vocab=True)
TIED = replace(ARGS, tie_embeddings=True)


def batch(step: int) -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(0, ARGS.vocab_size, (2, 9), generator=torch.Generator().manual_seed(step))
    return [(ids[:, :-1], ids[:, 1:])]


def train(group: Group, args: ModelArgs, steps: range, source: Path | None, target: Path | None) -> list[Tensor]:
    """Losses of ``steps``, continuing from ``source`` and saving to ``target``."""
    model = Transformer(args, group=group, seed=1 if source else 42)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if source is not None:
        assert load(source, model, optimizer, group=group) == {"step": steps.start}
    losses = [train_step(model, optimizer, batch(i), group=group).loss for i in steps]
    if target is not None:
        save(target, model, optimizer, {"step": steps.stop}, group=group)
    return losses


@pytest.mark.parametrize("args", [ARGS, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "writer", [pytest.param(("simulated", 1), marks=pytest.mark.slow), ("simulated", 4), ("gloo", 2)], ids=str
)
def test_resuming_at_another_size_changes_nothing(ranks: Ranks, tmp_path: Path, args: ModelArgs, writer: Any) -> None:
    want = ranks.on("simulated", 1)(train, args, range(6), None, None, num_shards=8)[0]
    first = ranks.on(*writer)(train, args, range(3), None, tmp_path / "c", num_shards=8)[0]
    for reader in [("simulated", 1), ("simulated", 2), ("simulated", 8), ("gloo", 4)]:
        second = ranks.on(*reader)(train, args, range(3, 6), tmp_path / "c", None, num_shards=8)[0]
        assert torch.equal(torch.stack(first + second), torch.stack(want)), reader


def test_other_tools_see_the_unpadded_whole(ranks: Ranks, tmp_path: Path) -> None:
    ranks.on("simulated", 4)(train, ARGS, range(2), None, tmp_path / "c", num_shards=8)
    dcp_to_torch_save(tmp_path / "c", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt")
    reference = Transformer(ARGS, group=Group.single(8))
    load(tmp_path / "c", reference, group=Group.single(8))
    table = whole["model.tok_embeddings.weight"]
    assert table.shape == (51, 32)
    assert torch.equal(table, reference.tok_embeddings.weight[:51])
    assert whole["optimizer.layers.0.attention.wo.weight.exp_avg"].shape == (32, 32)
    names = {f"model.{name}" for name, _ in reference.named_parameters()}
    assert {name for name in whole if name.startswith("model.")} == names


def save_twice(group: Group, path: Path) -> None:
    for step in (1, 2):
        save(path, Transformer(ARGS, group=group, seed=step), info={"step": step}, group=group)


def test_saving_again_replaces(ranks: Ranks, tmp_path: Path) -> None:
    ranks.on("simulated", 2)(save_twice, tmp_path / "c")
    assert read_info(tmp_path / "c") == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    model = Transformer(ARGS)
    load(tmp_path / "c", model, group=Group.single())
    want = ranks.on("simulated", 1)(whole_table, 2, num_shards=2)[0]
    assert torch.equal(model.tok_embeddings.weight[:51], want[:51])


def whole_table(group: Group, seed: int) -> Tensor:
    return Transformer(ARGS, group=group, seed=seed).tok_embeddings.weight.detach()


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group.single()
    save(tmp_path / "c", Transformer(ARGS), info={"step": 1}, group=group)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("src.checkpoint.dcp_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "c", Transformer(ARGS), info={"step": 2}, group=group)
    monkeypatch.undo()
    assert read_info(tmp_path / "c") == {"step": 1}
    save(tmp_path / "c", Transformer(ARGS), info={"step": 3}, group=group)
    assert read_info(tmp_path / "c") == {"step": 3}


@pytest.mark.parametrize(
    "args, message",
    [
        (replace(ARGS, n_layers=3), r"of another model: it has no model\.layers\.2"),
        (replace(ARGS, n_layers=1), r"of another model: this one has no model\.layers\.1"),
        (replace(ARGS, vocab_size=52), r"output\.weight is \[51, 32\] there and \[52, 32\] here"),
    ],
)
def test_checkpoints_of_another_model(tmp_path: Path, args: ModelArgs, message: str) -> None:
    save(tmp_path / "c", Transformer(ARGS), group=Group.single())
    model = Transformer(args)
    before = model.norm.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "c", model, group=Group.single())
    assert torch.equal(model.norm.weight, before)


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata"])
def test_truncated_checkpoints(tmp_path: Path, victim: str) -> None:
    save(tmp_path / "c", Transformer(ARGS), group=Group.single())
    file = tmp_path / "c" / victim
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"is damaged: {victim} has {size - 7} bytes of {size}"):
        load(tmp_path / "c", Transformer(ARGS), group=Group.single())
    file.unlink()
    with pytest.raises(ValueError, match=rf"is damaged: {victim} has 0 bytes of {size}"):
        load(tmp_path / "c", Transformer(ARGS), group=Group.single())


def test_missing_checkpoints_and_states(tmp_path: Path) -> None:
    model = Transformer(ARGS)
    with pytest.raises(ValueError, match="nowhere is not a checkpoint"):
        load(tmp_path / "nowhere", model, group=Group.single())
    save(tmp_path / "c", model, group=Group.single())
    with pytest.raises(ValueError, match="holds no optimizer state"):
        load(tmp_path / "c", model, torch.optim.AdamW(model.parameters()), group=Group.single())


def test_views_are_for_checkpoints_only() -> None:
    state = sharded_state_dict(Transformer(ARGS, group=Group.single(8)), group=Group.single(8))
    assert state["model.output.weight"].size() == (51, 32)
    with pytest.raises(TypeError, match="ShardView"):
        state["model.output.weight"] + 1


def test_wrappers_do_not_change_names() -> None:
    args = replace(ARGS, dropout=0.1)
    plain, wrapped = Transformer(args), Transformer(args)
    wrapped.layers[0] = torch.compile(wrapped.layers[0], backend="eager")
    wrapped.layers[1].attention = checkpoint_wrapper(wrapped.layers[1].attention)
    names = [list(sharded_state_dict(model, group=Group.single())) for model in (plain, torch.compile(wrapped))]
    assert names[0] == names[1] and "model.layers.1.attention.dropout.calls" in names[0]
