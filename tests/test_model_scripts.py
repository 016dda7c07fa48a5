"""scripts.generate and scripts.convert, on a tiny Llama with a tokenizer of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import convert, generate
from src import Group, simulate
from src.formats import load_hugging_face

from .llama_directories import reference

tokenizers = pytest.importorskip("tokenizers")

TEXT = "the quick brown fox jumps over the lazy dog; größe and naïveté, the end of the story. " * 3
PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as it comes from the Hub: weights, config, tokenizer, generation settings."""
    path = tmp_path_factory.mktemp("hub") / "model"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    specials = ["<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=104, special_tokens=specials)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    reference("default", vocab_size=tokenizer.get_vocab_size()).save_pretrained(path, max_shard_size="50KB")
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.token_to_id("</s>")]}))
    return path


def text_of(capfd: pytest.CaptureFixture[str], *arguments: Any) -> str:
    generate.main([str(argument) for argument in arguments])
    return capfd.readouterr().out


def theirs(path: Path, count: int) -> list[int]:
    """The new tokens of transformers' greedy generation, up to the end of text."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(path, local_files_only=True)
    ids = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(PROMPT).ids
    options = {"attention_mask": torch.ones(1, len(ids)), "max_new_tokens": count, "do_sample": False}
    tokens = model.generate(torch.tensor([ids]), **options)[0]
    return [token for token in tokens[len(ids) :].tolist() if token != 1]


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers_at_every_size(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    want = tokenizer.decode(theirs(model, 70)) + "\n"
    assert len(want) > 20
    options = ("--model", model, "--prompt", PROMPT, "--max-new-tokens", 70, "--device", "cpu")
    assert text_of(capfd, *options) == want
    for world_size in (2, 4, 8):
        assert text_of(capfd, *options[:-2], "--simulate", world_size) == want


@pytest.mark.slow
def test_under_torchrun(model: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["-m", "scripts.generate", "--model", str(model), "--prompt", PROMPT, "--max-new-tokens", "12"]
    options += ["--temperature", "0.9", "--top-k", "20", "--num-shards", "4", "--device", "cpu"]
    several = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    one = subprocess.run([sys.executable, *options], capture_output=True, text=True, check=True)
    assert several.stdout == one.stdout and len(one.stdout) > 5
    assert "prefill" in one.stderr and "decode" in one.stderr and "tokens/s" in one.stderr


def test_several_prompts_and_where_they_stop(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = "naïveté"
    options = ("--model", model, "--max-new-tokens", 15, "--simulate", 2, "--ignore-eos", "--prompt")
    alone = [text_of(capfd, *options, prompt) for prompt in (PROMPT, other)]
    assert text_of(capfd, *options, PROMPT, "--prompt", other) == f"--- 1 ---\n{alone[0]}--- 2 ---\n{alone[1]}"
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    third = tokenizer.id_to_token(theirs(model, 3)[2])
    stop = tokenizer.decoder.decode([third])
    cut = text_of(capfd, *options, PROMPT, "--stop", stop)
    assert alone[0].startswith(cut[:-1]) and len(cut) < len(alone[0])


def test_the_models_own_end_of_text(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """That of generation_config.json before that of config.json."""
    source = tmp_path / "model"
    shutil.copytree(model, source)
    tokens = theirs(model, 12)
    end = next(token for token in tokens if tokens.index(token) > 2)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 1]}))
    options = ("--model", source, "--prompt", PROMPT, "--max-new-tokens", 12, "--simulate", 2)
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    assert text_of(capfd, *options) == tokenizer.decode(tokens[: tokens.index(end)]) + "\n"
    assert text_of(capfd, *options, "--ignore-eos") == tokenizer.decode(tokens) + "\n"
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": end}))
    assert text_of(capfd, *options) == tokenizer.decode(tokens[: tokens.index(end)]) + "\n"


def test_streamed_text_is_the_decoded_text(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is lost or doubled between tokens; a batch shows the same ids decoded at once."""
    options = ("--model", model, "--max-new-tokens", 40, "--simulate", 1, "--ignore-eos", "--prompt", "größe")
    streamed = text_of(capfd, *options)
    first, second = text_of(capfd, *options, "--prompt", "größe").split("--- 2 ---\n")
    assert first == f"--- 1 ---\n{second}"
    assert streamed.rstrip("\n�") == second.rstrip("\n�") and len(streamed) > 30


@pytest.mark.parametrize(
    "change, message",
    [
        (("--temperature", "-1"), "temperature=-1.0 must not be negative"),
        (("--stop", "the quick"), r"--stop 'the quick' is \d tokens, not one"),
        (("--model", "no/such/place"), "no/such/place does not exist"),
        (("--model", "tests"), "tests is no directory of a model"),
        (("--simulate", "3"), "n_heads=8"),
    ],
)
def test_generate_errors(model: Path, change: tuple[str, str], message: str) -> None:
    options = ["--model", str(model), "--prompt", PROMPT, "--device", "cpu", "--max-new-tokens", "3", *change]
    if change[0] == "--simulate":
        options = [option for option in options if option not in ("--device", "cpu")]
    with pytest.raises(SystemExit, match=message):
        generate.main(options)


def test_what_a_model_is_comes_before_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit, match=r"model_type='gpt2' of this config\.json is not supported, only 'llama' is"):
        generate.main(["--model", str(tmp_path), "--prompt", PROMPT])


@pytest.mark.parametrize("option", [("--top-k", "5"), ("--top-p", "0.9"), ("--temperature", "0", "--top-k", "5")])
def test_top_k_and_top_p_need_a_temperature(option: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "there", "--prompt", PROMPT, *option]
    with pytest.raises(SystemExit):
        generate.parse(arguments)
    assert "error: --top-k and --top-p choose among draws, and none is made; pass --temperature 1, too" in (
        capfd.readouterr().err
    )
    assert generate.parse([*arguments, "--temperature", "1"]).temperature == 1


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_a_file_size_that_is_none(size: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert.parse(["there", "here", "--to", "hugging-face", "--max-file-size", size])
    assert f"argument --max-file-size: {size} must be above 0" in capfd.readouterr().err
    half = convert.parse(["there", "here", "--to", "hugging-face", "--max-file-size", "0.5"])
    assert half.max_file_size == 2**29


def test_convert_round_trip(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """hugging-face -> checkpoint -> hugging-face -> meta -> hugging-face, and the same text from each."""
    places = [("a", "checkpoint"), ("b", "hugging-face"), ("c", "meta"), ("d", "hugging-face")]
    source = model
    options = ("--prompt", PROMPT, "--max-new-tokens", 12, "--simulate", 2)
    want = text_of(capfd, "--model", model, *options)
    count = sum(parameter.numel() for parameter in load_hugging_face(model, group=Group.single()).parameters())
    for name, kind in places:
        convert.main([str(source), str(tmp_path / name), "--to", kind])
        shown = capfd.readouterr()
        assert f"-> {kind}: {count:,} parameters" in shown.out
        for what in ("reading", "writing"):
            assert f"{what}: {4 * count / 1024:.0f}kB" in shown.err
        source = tmp_path / name
        assert (source / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
        assert text_of(capfd, "--model", source, *options) == want
    import safetensors.torch

    whole = [
        {k: v for file in sorted(path.glob("*.safetensors")) for k, v in safetensors.torch.load_file(file).items()}
        for path in (model, tmp_path / "b", tmp_path / "d")
    ]
    for other in whole[1:]:
        assert other.keys() == whole[0].keys() and all(torch.equal(other[k], whole[0][k]) for k in other)


def test_convert_on_ranks(model: Path, tmp_path: Path) -> None:
    def run(group: Any) -> None:
        convert.convert(group, convert.parse([str(model), str(tmp_path / "a"), "--to", "checkpoint"]))
        convert.convert(group, convert.parse([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "hugging-face"]))

    simulate(run, 4)
    transformers = pytest.importorskip("transformers")
    assert len(list(tmp_path.glob("b/*.safetensors"))) == 1
    a, b = (transformers.LlamaForCausalLM.from_pretrained(p, local_files_only=True) for p in (model, tmp_path / "b"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_ends_of_text_survive(model: Path, tmp_path: Path) -> None:
    """Of a config.json that names them; and an export names none that transformers would make up."""
    config = json.loads((model / "config.json").read_text())
    assert config["eos_token_id"] == 2
    only_config = tmp_path / "source"
    shutil.copytree(model, only_config)
    (only_config / "generation_config.json").unlink()
    convert.main([str(only_config), str(tmp_path / "a"), "--to", "checkpoint"])
    convert.main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "hugging-face"])
    transformers = pytest.importorskip("transformers")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == 2
    assert json.loads((tmp_path / "b/config.json").read_text())["eos_token_id"] is None


def test_convert_refuses_what_exists(model: Path, tmp_path: Path) -> None:
    for kind in convert.FORMATS:
        with pytest.raises(SystemExit, match="exists; choose another path"):
            convert.main([str(model), str(tmp_path), "--to", kind])
    assert os.listdir(tmp_path) == []
