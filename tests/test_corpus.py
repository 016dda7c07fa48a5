"""The training text: which files, the split, the tokenizer, the cache, and the batches."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts import corpus
from scripts.corpus import END_OF_TEXT, Corpus, GivenTokenizer, prepare

tokenizers = pytest.importorskip("tokenizers")

VOCAB_SIZE = 300


def text_of(index: int) -> str:
    return "".join(f"def function_{index}_{line}(value):\n    return value + {line}\n" for line in range(20))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Sixty small files in two directories; their names put some of them on each side of the split."""
    root = tmp_path / "library"
    for index in range(60):
        path = root / f"package_{index % 2}" / f"module_{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text_of(index))
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def texts_in(opened: Corpus, tokens: Sequence[int] | np.ndarray) -> list[str]:
    """The texts between the end-of-text tokens, decoded."""
    ids = np.asarray(tokens)
    ends = np.flatnonzero(ids == opened.tokenizer.token_to_id(END_OF_TEXT))
    assert ends[-1] == len(ids) - 1
    return [opened.tokenizer.decode(part[part != ids[ends[-1]]].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def test_the_default_text_is_the_standard_library_without_tests() -> None:
    files = corpus._list_files(None)
    names = [name for name, _ in files]
    assert len(names) > 300 and names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "unittest/case.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    parts = {part for name in names for part in name.split("/")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def test_files_are_whole_on_one_side(library: Path, cache: Path) -> None:
    opened = prepare(cache, VOCAB_SIZE, library)
    train, validation = texts_in(opened, opened.train), texts_in(opened, opened.validation)
    assert 1 <= len(validation) <= 10
    assert set(train).isdisjoint(validation)
    assert sorted(train + validation) == sorted(text_of(index) for index in range(60))


def test_a_file_keeps_its_side_when_others_come_and_go(library: Path, cache: Path) -> None:
    opened = prepare(cache, VOCAB_SIZE, library)
    before = set(texts_in(opened, opened.validation))
    for index in range(0, 60, 3):
        (library / f"package_{index % 2}" / f"module_{index}.py").unlink()
    reopened = prepare(cache, VOCAB_SIZE, library)
    after = set(texts_in(reopened, reopened.validation))
    assert after == before - {text_of(index) for index in range(0, 60, 3)}


def test_the_tokenizer_learns_from_the_training_part_alone(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("alpha\n" * 1900 + "omega\n" * 100)
    tokenizer = prepare(cache, 4096, path).tokenizer
    assert tokenizer.token_to_id("alpha") is not None
    assert tokenizer.token_to_id("omega") is None


@pytest.mark.parametrize("end", ["", "\n"])
def test_one_file_gives_its_tail_at_a_line_end(cache: Path, tmp_path: Path, end: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {index} of the text" for index in range(1000)) + end)
    opened = prepare(cache, VOCAB_SIZE, path)
    (train,), (validation,) = texts_in(opened, opened.train), texts_in(opened, opened.validation)
    assert train + validation == path.read_text()
    assert train.endswith("\n")
    assert 0.05 <= len(validation) / len(train + validation) < 0.052


def test_few_files_give_the_tail_of_all_text() -> None:
    texts = ["first line\n" * 100, "second line\n" * 10, "third\n"]
    train, validation = corpus._split(list(zip("abc", texts, strict=True)))
    assert train == ["first line\n" * 100, "second line\n" * 5]
    assert validation == ["second line\n" * 5, "third\n"]


def test_a_text_of_one_line_is_cut_all_the_same() -> None:
    assert corpus._split([("file", "x" * 1000)]) == (["x" * 950], ["x" * 50])


@pytest.mark.parametrize(
    "text",
    ["", "tabs\tand\r\nline ends\r\n\n  ", "é 漢字 🙂 \x00 \ufffd", f"a{END_OF_TEXT}b", " leading and trailing "],
)
def test_round_trip(library: Path, cache: Path, text: str) -> None:
    opened = prepare(cache, VOCAB_SIZE, library)
    ids = opened.tokenizer.encode(text).ids
    assert opened.tokenizer.decode(ids) == text
    assert opened.tokenizer.token_to_id(END_OF_TEXT) not in ids
    assert all(0 <= id_ < opened.vocab_size for id_ in ids)


def test_a_long_text_is_encoded_in_pieces(library: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = prepare(cache, VOCAB_SIZE, library)
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 50)
    texts = [text_of(3), "x" * 120, text_of(4)]
    assert ["".join(corpus._pieces(text)) for text in texts] == texts
    assert all(piece.endswith("\n") and len(piece) <= 50 for piece in corpus._pieces(texts[0]))
    tokens = corpus._encode(opened.tokenizer, texts * 10, opened.tokenizer.token_to_id(END_OF_TEXT))
    assert tokens.dtype == np.uint16
    assert texts_in(opened, tokens) == texts * 10


def test_a_large_vocabulary_needs_wider_tokens(library: Path, cache: Path) -> None:
    tokenizer = prepare(cache, VOCAB_SIZE, library).tokenizer
    tokenizer.add_tokens([f"<{index}>" for index in range(1 << 16)])
    tokens = corpus._encode(tokenizer, ["<65535>"], tokenizer.token_to_id(END_OF_TEXT))
    assert tokens.dtype == np.uint32
    assert tokens[0] > 65535 and tokenizer.decode(tokens.tolist()) == "<65535>"


def test_a_given_tokenizer(library: Path, cache: Path) -> None:
    """It and its end are part of what a corpus is known by; nothing is trained, nothing put before a text."""
    own = prepare(cache, VOCAB_SIZE, library)
    copy = cache.parent / "tokenizer.json"
    tokenizer = own.tokenizer
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="a $A", special_tokens=[("a", 65)])
    tokenizer.save(str(copy))
    end = tokenizer.token_to_id(END_OF_TEXT)
    given = prepare(cache, 1, library, GivenTokenizer(copy, end))
    other_end = prepare(cache, 1, library, GivenTokenizer(copy, 5))
    copy.write_text(copy.read_text() + " ")
    other_file = prepare(cache, 1, library, GivenTokenizer(copy, end))
    assert len({own.path, given.path, other_end.path, other_file.path}) == 4
    assert np.array_equal(given.train, own.train) and given.vocab_size == own.vocab_size
    ends = own.train == end
    assert (other_end.train[ends] == 5).all() and np.array_equal(other_end.train[~ends], own.train[~ends])


def test_sizes_are_those_of_the_text(library: Path, cache: Path) -> None:
    opened = prepare(cache, VOCAB_SIZE, library)
    validation = texts_in(opened, opened.validation)
    assert opened.bytes_per_token == sum(len(text) for text in validation) / len(opened.validation)
    assert opened.vocab_size == opened.tokenizer.get_vocab_size() == VOCAB_SIZE
    meta = json.loads((opened.path / "meta.json").read_text())
    assert meta["files"] == 60
    assert (meta["train_tokens"], meta["validation_tokens"]) == (len(opened.train), len(opened.validation))
    assert meta["train_bytes"] == sum(len(text_of(index)) for index in range(60)) - meta["validation_bytes"]


def test_a_small_text_gives_a_smaller_vocabulary(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two three\n" * 10)
    opened = prepare(cache, 4096, path)
    assert 257 < opened.vocab_size < 300


def test_hidden_and_binary_files_are_skipped(library: Path, cache: Path) -> None:
    for name, content in {
        ".hidden": b"hidden",
        ".git/config": b"hidden",
        "image.bin": b"\x89\x00binary",
        "empty.txt": b"",
        "latin.txt": b"caf\xe9",
    }.items():
        (library / name).parent.mkdir(exist_ok=True)
        (library / name).write_bytes(content)
    opened = prepare(cache, VOCAB_SIZE, library)
    texts = texts_in(opened, opened.train) + texts_in(opened, opened.validation)
    assert len(texts) == 61 and "caf\ufffd" in texts


def test_a_second_prepare_opens_the_first_result(library: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(cache, VOCAB_SIZE, library)
    written = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    assert sorted(path.name for path in written) == ["meta.json", "tokenizer.json", "train.npy", "validation.npy"]
    monkeypatch.delattr(corpus, "_build")
    second = prepare(cache, VOCAB_SIZE, library)
    assert second.path == first.path
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == written
    assert isinstance(second.train, np.memmap) and not second.train.flags.writeable
    assert np.array_equal(second.train, first.train)


def test_the_cache_tells_texts_and_sizes_apart(library: Path, cache: Path) -> None:
    changed = library / "package_0" / "module_0.py"
    paths = [prepare(cache, VOCAB_SIZE, library).path, prepare(cache, VOCAB_SIZE + 1, library).path]
    changed.write_text(text_of(0).replace("value", "other"))
    paths.append(prepare(cache, VOCAB_SIZE, library).path)
    changed.rename(changed.with_name("renamed.py"))
    paths.append(prepare(cache, VOCAB_SIZE, library).path)
    assert len(set(paths)) == 4 and set(cache.iterdir()) == set(paths)
    assert all(len(path.name) == 16 for path in paths)


def test_the_slower_of_two_processes_takes_the_result_of_the_faster(
    library: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = prepare(tmp_path / "other", VOCAB_SIZE, library).path
    build = corpus._build

    def build_while_another_finishes(directory: Path, documents: Sequence[corpus.Document], *rest: Any) -> None:
        build(directory, documents, *rest)
        shutil.copytree(winner, cache / winner.name)
        (cache / winner.name / "winner").touch()

    monkeypatch.setattr(corpus, "_build", build_while_another_finishes)
    opened = prepare(cache, VOCAB_SIZE, library)
    assert (opened.path / "winner").exists()
    assert list(cache.iterdir()) == [opened.path]


def test_a_failed_build_leaves_nothing(library: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(corpus, "_encode", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        prepare(cache, VOCAB_SIZE, library)
    assert list(cache.iterdir()) == []


def test_training_batches_depend_on_seed_and_step_alone(library: Path, cache: Path) -> None:
    opened = prepare(cache, VOCAB_SIZE, library)
    inputs, targets = opened.training_batch(step=7, batch_size=4, seq_len=16, seed=1)
    torch.manual_seed(0)
    np.random.seed(0)
    again, _ = Corpus.open(opened.path).training_batch(7, 4, 16, 1)
    assert torch.equal(inputs, again)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert not torch.equal(inputs, opened.training_batch(8, 4, 16, 1)[0])
    assert not torch.equal(inputs, opened.training_batch(7, 4, 16, 2)[0])


def test_training_windows_reach_both_ends(library: Path, cache: Path) -> None:
    opened = prepare(cache, VOCAB_SIZE, library)
    seq_len = len(opened.train) - 3  # three windows
    inputs, targets = opened.training_batch(step=0, batch_size=64, seq_len=seq_len, seed=0)
    expected = torch.from_numpy(opened.train.astype(np.int64)).unfold(0, seq_len + 1, 1)
    drawn = torch.cat([inputs, targets[:, -1:]], dim=1).unique(dim=0)
    assert torch.equal(drawn, expected.unique(dim=0)) and len(drawn) == 3


def test_validation_windows_are_fixed_and_span_the_part(library: Path, cache: Path) -> None:
    opened = prepare(cache, VOCAB_SIZE, library)
    batches = opened.validation_batches(batch_size=3, seq_len=16, count=2)
    assert len(batches) == 2
    for (inputs, targets), (again, _) in zip(batches, opened.validation_batches(3, 16, 2), strict=True):
        assert torch.equal(inputs, again)
        assert inputs.shape == (3, 16) and inputs.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    whole = torch.from_numpy(opened.validation.astype(np.int64))
    assert torch.equal(batches[0][0][0], whole[:16])
    assert torch.equal(batches[-1][1][-1], whole[-16:])


def test_a_text_too_short_for_a_sequence(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a few words\n" * 10)
    opened = prepare(cache, 257, path)
    for part, draw in (
        (opened.train, lambda seq_len: opened.training_batch(0, 1, seq_len, 0)),
        (opened.validation, lambda seq_len: opened.validation_batches(1, seq_len, 1)),
    ):
        tokens = len(part)
        draw(tokens - 1)
        with pytest.raises(ValueError, match=f"tokens={tokens}, .* seq_len={tokens} .* smaller seq_len"):
            draw(tokens)


def test_a_vocabulary_too_small_for_bytes(library: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=256 .* at least 257"):
        prepare(cache, 256, library)
    assert prepare(cache, 257, library).vocab_size == 257


def test_no_text_names_the_path(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.bin").write_bytes(b"\0")
    (tmp_path / "directory").mkdir()
    for name in ("empty.txt", "binary.bin", "directory", "missing"):
        with pytest.raises(ValueError, match=f"no text in data=.*{name}"):
            prepare(cache, VOCAB_SIZE, tmp_path / name)


def test_a_missing_tokenizers_library_names_the_extra(
    library: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tokenizers is not installed; pip install -e '\.\[train\]'"):
        prepare(cache, VOCAB_SIZE, library)
