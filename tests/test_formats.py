"""Llama checkpoints from outside: what is read and computed, against transformers; and back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from src import Group, simulate
from src.checkpoint import load, save
from src.distributed import all_gather
from src.formats import load_hugging_face, load_meta, read_model_args, save_hugging_face, save_meta
from src.formats.llama_config import args_from_config, config_from_args
from src.formats.slices import local_slices
from src.modeling import ModelArgs, Transformer
from src.rope_scaling import RopeScaling
from src.verification import unsharded_weights

from .llama_directories import LENGTH, VARIANTS, rewrite_as_version_4, write

LENGTHS = (20, 130, LENGTH, LENGTH - 1, 60, LENGTH + 1)
"""Above and below the trained length, in an order that makes "dynamic" grow, keep and return."""


def ids(length: int, vocab_size: int) -> Tensor:
    return (torch.arange(2 * length) * 37 % vocab_size).view(2, length)


@pytest.fixture(scope="module", params=VARIANTS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A checkpoint, and the logits that transformers computes from it."""
    path = tmp_path_factory.mktemp(request.param) / "model"
    model = write(path, request.param)
    with torch.no_grad():
        return path, [model(ids(length, model.config.vocab_size)).logits for length in LENGTHS]


def logits(group: Group, path: Path, **changes: Any) -> list[Tensor]:
    args = replace(read_model_args(path), max_seq_len=max(LENGTHS), **changes)
    model = load_hugging_face(path, args, group=group)
    return unsharded_logits(model, group)


@torch.no_grad()
def unsharded_logits(model: Transformer, group: Group) -> list[Tensor]:
    whole = [all_gather(model(ids(length, model.args.vocab_size)), group=group, dim=-1) for length in LENGTHS]
    return [each[..., : model.args.vocab_size] for each in whole]


def test_logits_equal_those_of_transformers(directory: tuple[Path, list[Tensor]]) -> None:
    path, want = directory
    assert all(torch.equal(*pair) for pair in zip(logits(Group.single(), path), want, strict=True))
    for world_size in (2, 4):
        for got in simulate(logits, world_size, path):
            torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_logits_with_shards_fixed_are_the_same_at_every_size(directory: tuple[Path, list[Tensor]]) -> None:
    path, _ = directory
    one = simulate(logits, 1, path, num_shards=4)[0]
    for world_size in (2, 4):
        got = simulate(logits, world_size, path, num_shards=4)[0]
        assert all(torch.equal(*pair) for pair in zip(one, got, strict=True))


def test_more_ranks_than_kv_heads(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "llama3", max_shard_size="20KB")
    with torch.no_grad():
        want = [model(ids(length, 104)).logits for length in LENGTHS]
    torch.testing.assert_close(simulate(logits, 8, tmp_path / "model")[5], want, rtol=0, atol=2e-5)


def test_on_gloo(directory: tuple[Path, list[Tensor]], ranks: Any) -> None:
    path, want = directory
    for got in ranks.on("gloo", 2)(logits, path):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", ["default", "linear", "dynamic", "llama3", "yarn", "tied"])
def test_version_4_configs_say_the_same(tmp_path: Path, variant: str) -> None:
    write(tmp_path, variant)
    args = read_model_args(tmp_path)
    rewrite_as_version_4(tmp_path)
    assert "rope_parameters" not in (tmp_path / "config.json").read_text()
    assert read_model_args(tmp_path) == args


def test_each_rank_reads_its_slices_only(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "default", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 3
    replicated = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    total = sum(p.nbytes for p in model.parameters())

    def bytes_read(group: Group) -> int:
        sizes: list[int] = []
        load_hugging_face(tmp_path / "model", group=group, report=lambda _, size: sizes.append(size))
        return sum(sizes)

    for world_size in (1, 2, 4):
        assert simulate(bytes_read, world_size) == [(total - replicated) // world_size + replicated] * world_size


def test_transformers_is_not_needed(tmp_path: Path) -> None:
    write(tmp_path / "model", "default")
    program = (
        "import sys\nfrom src import Group\nfrom src.formats import load_hugging_face, save_hugging_face\n"
        f"model = load_hugging_face({str(tmp_path / 'model')!r}, group=Group.single())\n"
        f"save_hugging_face({str(tmp_path / 'copy')!r}, model, group=Group.single())\n"
        "assert not {'transformers', 'tokenizers', 'huggingface_hub'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_export_is_loaded_by_transformers_with_the_same_logits(directory: tuple[Path, list[Tensor]]) -> None:
    path, want = directory
    transformers = pytest.importorskip("transformers")

    def export(group: Group) -> None:
        args = replace(read_model_args(path), max_seq_len=max(LENGTHS))
        save_hugging_face(path.parent / "exported", load_hugging_face(path, args, group=group), group=group)

    simulate(export, 2)
    theirs = transformers.LlamaForCausalLM.from_pretrained(path.parent / "exported", local_files_only=True).eval()
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        got = [theirs(ids(length, theirs.config.vocab_size)).logits for length in LENGTHS]
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert read_model_args(path.parent / "exported") == read_model_args(path)


def test_many_files(tmp_path: Path) -> None:
    write(tmp_path / "model", "default")
    model = load_hugging_face(tmp_path / "model", group=Group.single())
    save_hugging_face(tmp_path / "copy", model, group=Group.single(), max_file_size=30_000)
    index = json.loads((tmp_path / "copy/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and all((tmp_path / "copy" / file).stat().st_size < 40_000 for file in files)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    again = load_hugging_face(tmp_path / "copy", group=Group.single())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="copy exists; choose another path"):
        save_hugging_face(tmp_path / "copy", model, group=Group.single())
    with pytest.raises(ValueError, match="max_file_size=0 must be at least 1 byte"):
        save_hugging_face(tmp_path / "none", model, group=Group.single(), max_file_size=0)
    assert not (tmp_path / "none").exists()


OURS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=40, multiple_of=8, max_seq_len=130)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True}, {"rope_scaling": RopeScaling("llama3", 64, 4.0, 16, 1.0, 4.0)}],
    ids=["plain", "tied", "llama3"],
)
def test_our_own_pairing_is_permuted_on_the_way(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A model whose heads pair neighbours: the same function as transformers', and there and back the same weights."""
    transformers = pytest.importorskip("transformers")
    args = replace(OURS, **changes)

    def export(group: Group) -> tuple[list[Tensor], dict[str, Tensor]]:
        model = Transformer(args, group=group)
        save_hugging_face(tmp_path / "model", model, group=group)
        return unsharded_logits(model, group), unsharded_weights(model, group=group)

    want, weights = simulate(export, 2)[0]
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True).eval()
    with torch.no_grad():
        got = [theirs(ids(length, 40)).logits for length in LENGTHS]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def back(group: Group) -> dict[str, Tensor]:
        model = load_hugging_face(tmp_path / "model", Transformer(args, group=group, seed=1), group=group)
        return unsharded_weights(model, group=group)

    for world_size in (1, 4):
        again = simulate(back, world_size)[0]
        assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


def test_metas_format(tmp_path: Path) -> None:
    """There and back; and files of two of Meta's ranks, whose embedding may be cut along its features."""
    args = replace(OURS, ffn_dim=72, rope_scaling=RopeScaling("llama3", 65536, 8.0, 8192, 1.0, 4.0))
    model = Transformer(args)
    simulate(lambda group: save_meta(tmp_path / "model", loaded(model, group), group=group), 2)
    want = dict(model.named_parameters())

    def back(group: Group) -> tuple[ModelArgs, dict[str, Tensor]]:
        again = load_meta(tmp_path / "model", group=group)
        return again.args, unsharded_weights(again, group=group)

    for world_size in (1, 2, 4):
        found, weights = simulate(back, world_size)[0]
        assert weights.keys() == want.keys() and all(torch.equal(weights[name], want[name]) for name in want)
        shape = (found.rope_scaling, found.dim, found.kv_heads, found.n_layers)
        assert shape == (args.rope_scaling, args.dim, args.kv_heads, 2)

    whole = torch.load(tmp_path / "model/consolidated.00.pth")
    for embedding_dim in (0, 1):
        dims = {"wo": 1, "w2": 1, "tok_embeddings": embedding_dim}
        for part in range(2):
            content = {
                name: value if "norm" in name else value.chunk(2, dims.get(name.split(".")[-2], 0))[part].clone()
                for name, value in whole.items()
            }
            torch.save(content | {"rope.freqs": torch.ones(4)}, tmp_path / f"model/consolidated.{part:02}.pth")
        for world_size in (1, 4):
            weights = simulate(back, world_size)[0][1]
            assert all(torch.equal(weights[name], want[name]) for name in want)


def loaded(model: Transformer, group: Group) -> Transformer:
    """``model`` over the ranks of ``group``."""
    part, whole = Transformer(model.args, group=group), dict(model.named_parameters())
    for item in local_slices(part, group):
        item.fill(whole[item.name].detach()[item.index])
    return part


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(model_type="gpt2"), "model_type='gpt2' .* only 'llama' is"),
        (lambda c: c.update(attention_bias=True), "attention_bias=True .* not supported"),
        (lambda c: c.pop("hidden_size"), "has no hidden_size"),
        (lambda c: c.update(rope_parameters={"rope_type": "longrope"}), "rope_type='longrope' is not supported"),
        (lambda c: c.update(rope_parameters={"rope_type": "linear", "factor": None}), "factor of at least 1, not None"),
        (lambda c: c.update(num_hidden_layers=3), r"it has no model\.layers\.2"),
        (lambda c: c.update(num_hidden_layers=1), r"it holds an unknown model\.layers\.1"),
        (lambda c: c.update(intermediate_size=80), r"mlp.gate_proj.weight is \[96, 64\] there and \[80, 64\] here"),
        (lambda c: c.update(tie_word_embeddings=False, num_attention_heads=7), "n_kv_heads=4 must divide n_heads=7"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    write(tmp_path, "default")
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_hugging_face(tmp_path, group=Group.single())


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        load_hugging_face(tmp_path, group=Group.single())
    write(tmp_path, "default", max_shard_size="30KB")
    last = sorted(tmp_path.glob("model-*"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"cannot read .*{last.name}"):
        load_hugging_face(tmp_path, group=Group.single())
    last.unlink()
    with pytest.raises(ValueError, match=f"names files that are not there: {last.name}"):
        load_hugging_face(tmp_path, group=Group.single())
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="holds neither"):
        load_hugging_face(tmp_path, group=Group.single())


def test_a_given_model_is_not_changed_by_what_does_not_fit(tmp_path: Path) -> None:
    write(tmp_path, "default")
    model = Transformer(replace(read_model_args(tmp_path), ffn_dim=80))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="is of another model"):
        load_hugging_face(tmp_path, model, group=Group.single())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_models_that_a_format_cannot_hold(tmp_path: Path) -> None:
    group = Group.single()
    for changes, message in (
        ({"rope_pairing": "halves"}, "pair neighbours"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"rope_scaling": RopeScaling("linear", 64, 2.0)}, "rope_type='linear'"),
        ({"rope_scaling": RopeScaling("llama3", 64, 8.0, 32, 1.0, 4.0)}, "rope_type='llama3' with these settings"),
    ):
        with pytest.raises(ValueError, match=message):
            save_meta(tmp_path / "model", Transformer(replace(OURS, **changes)), group=group)
    assert not list(tmp_path.iterdir())


def test_imported_weights_in_checkpoints_of_other_sizes(tmp_path: Path) -> None:
    """Hugging Face -> tp=2 -> torch.distributed.checkpoint -> tp=4 -> Hugging Face."""
    model = write(tmp_path / "model", "odd-vocabulary")

    def first(group: Group) -> None:
        save(tmp_path / "checkpoint", load_hugging_face(tmp_path / "model", group=group), group=group)

    def second(group: Group) -> None:
        again = Transformer(read_model_args(tmp_path / "model"), group=group)
        load(tmp_path / "checkpoint", again, group=group)
        save_hugging_face(tmp_path / "copy", again, group=group)

    def padding(group: Group) -> list[Tensor]:
        """The rows that no checkpoint fills: nothing that lay in memory by chance is left in them."""
        again = load_hugging_face(tmp_path / "model", group=group)
        return [layer.weight.detach()[101 - 26 * group.rank :] for layer in (again.output, again.tok_embeddings)]

    simulate(first, 2)
    simulate(second, 4)
    assert [rows.shape[0] for rows in simulate(padding, 4)[3]] == [3, 3]
    assert not any(rows.any() for rows in simulate(padding, 4)[3])
    copy = type(model).from_pretrained(tmp_path / "copy", local_files_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_configs_there_and_back() -> None:
    for scaling in (None, RopeScaling("default", 99), RopeScaling("yarn", 64, None, 16), RopeScaling("dynamic", 64, 2)):
        args = replace(OURS, rope_scaling=scaling, rope_pairing="halves", pad_vocab=True)
        again = args_from_config(json.loads(json.dumps(config_from_args(args, torch.bfloat16))))
        assert again.rope_scaling == (scaling or RopeScaling("default", args.max_seq_len))
        assert (again.dim, again.kv_heads, again.head_dim, again.norm_eps) == (32, 2, 8, 1e-5)
