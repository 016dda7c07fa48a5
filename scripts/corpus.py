"""The training text: files, a byte-level BPE trained on them, tokens cached on disk, and batches.

Without data of one's own, the text is the source of the installed Python's standard library (about 12 MB), so that
training needs no download. All text is held in memory while a corpus is prepared; an opened corpus maps its tokens.
"""

import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .extras import import_extra

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and END_OF_TEXT
STDLIB_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
VALIDATION_SHARE = 20  # one file in so many, or one part of the text in so many
PIECE_CHARACTERS = 1 << 16
PIECES_PER_SLICE = 64

Document = tuple[str, str]  # relative path, text
Tokens = NDArray[np.integer[Any]]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Corpus:
    """A prepared text: token ids (one-dimensional, mapped from disk) and what they cost in bytes.

    ``vocab_size`` is what the tokenizer reached: on a small text fewer than it was asked for. ``bytes_per_token`` is
    that of the validation part, so a validation loss in nats per token is ``loss / ln 2 / bytes_per_token`` bits per
    byte.
    """

    path: Path
    train: Tokens
    validation: Tokens
    vocab_size: int
    bytes_per_token: float

    @classmethod
    def open(cls, path: Path) -> "Corpus":
        """The corpus that `prepare` left in the directory ``path``."""
        meta = json.loads((path / "meta.json").read_text())
        return cls(
            path=path,
            train=np.load(path / "train.npy", mmap_mode="r"),
            validation=np.load(path / "validation.npy", mmap_mode="r"),
            vocab_size=meta["vocab_size"],
            bytes_per_token=meta["validation_bytes"] / meta["validation_tokens"],
        )

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer of this corpus, loaded on first use."""
        return load_tokenizer(self.path / "tokenizer.json")

    def training_batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> Batch:
        """Inputs and targets, int64 ``[b, s]``: random windows that depend on ``seed`` and ``step`` alone.

        Hence every rank sees the same batch, and a resumed run the batches it would have seen.
        """
        windows = _count_windows("train", self.train, seq_len)
        starts = np.random.default_rng((seed, step)).integers(windows, size=batch_size)
        return _cut_windows(self.train, starts, seq_len)

    def validation_batches(self, batch_size: int, seq_len: int, count: int) -> list[Batch]:
        """``count`` batches of inputs and targets, int64 ``[b, s]``: evenly spaced windows, always the same."""
        windows = _count_windows("validation", self.validation, seq_len)
        starts = np.linspace(0, windows - 1, count * batch_size).astype(np.int64)
        return [_cut_windows(self.validation, row, seq_len) for row in starts.reshape(count, batch_size)]


@dataclass(frozen=True)
class GivenTokenizer:
    """A tokenizer.json to use instead of training one, and the id that it ends a text with."""

    path: Path
    end: int


def prepare(cache_root: Path, vocab_size: int, data: Path | None = None, given: GivenTokenizer | None = None) -> Corpus:
    """The corpus of ``data``, from the cache in ``cache_root`` or else built into it.

    Args:
        cache_root: directory of prepared corpora, one sub-directory each, named by a digest of the text and
            ``vocab_size``. It may be shared: of several processes that build at once, all open the first one's result.
        vocab_size: entries asked of the byte-level BPE, at least 257.
        data: a text file, or a directory of which every file counts that is neither hidden nor binary. ``None`` takes
            the source of Python's standard library without its tests.
        given: a tokenizer that exists; ``vocab_size`` then says nothing.

    Raises:
        ValueError: ``vocab_size`` is too small, or ``data`` holds no text.
        ImportError: the tokenizers library is missing.
    """
    if given is None and vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for a byte-level BPE: pass at least {MIN_VOCAB_SIZE} "
            f"(256 bytes and {END_OF_TEXT})"
        )
    documents = list(_read_documents(data))
    if not documents:
        raise ValueError(
            f"found no text in data={data}: pass a text file, or a directory of text files "
            "(hidden and binary files are skipped)"
        )
    target = cache_root / _digest(documents, vocab_size, given)
    if not target.exists():
        cache_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_root, prefix=".building-") as scratch:
            built = Path(scratch) / target.name
            built.mkdir()
            _build(built, documents, vocab_size, given)
            _publish(built, target)
    return Corpus.open(target)


def load_tokenizer(path: Path) -> "Tokenizer":
    """The tokenizer saved in ``path``; for it the text ``<|endoftext|>`` is ordinary text, as it was in training."""
    tokenizer: Tokenizer = import_extra("tokenizers", "train").Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True  # not kept in the file
    return tokenizer


def _read_documents(data: Path | None) -> Iterator[Document]:
    """Every text file that is not empty, in the order of the relative paths."""
    for name, path in _list_files(data):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if content and b"\0" not in content:
            yield name, content.decode("utf-8", errors="replace")


def _list_files(data: Path | None) -> list[tuple[str, Path]]:
    """Relative and full paths, sorted, of the standard library's modules or of the files that are not hidden."""
    if data is not None and data.is_file():
        return [(data.name, data)]
    root = Path(sysconfig.get_paths()["stdlib"]) if data is None else data
    files = []
    for path in root.rglob("*.py" if data is None else "*"):
        relative = path.relative_to(root)
        excluded = data is None and not STDLIB_EXCLUDED.isdisjoint(relative.parts)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not excluded and not hidden and path.is_file():
            files.append((relative.as_posix(), path))
    return sorted(files)


def _digest(documents: Sequence[Document], vocab_size: int, given: GivenTokenizer | None) -> str:
    digest = hashlib.sha256(f"format 1, vocab_size {vocab_size}".encode())
    if given is not None:
        digest = hashlib.sha256(f"format 1, end {given.end}, ".encode() + given.path.read_bytes())
    for name, text in documents:
        content = text.encode()
        digest.update(b"\0%s\0%d\0" % (os.fsencode(name), len(content)))
        digest.update(content)
    return digest.hexdigest()[:16]


def _build(directory: Path, documents: Sequence[Document], vocab_size: int, given: GivenTokenizer | None) -> None:
    """Train the tokenizer on the training part, encode both parts, and write all of it into ``directory``."""
    train, validation = _split(documents)
    if given is None:
        _train_tokenizer(train, vocab_size).save(str(directory / "tokenizer.json"))
    else:
        shutil.copyfile(given.path, directory / "tokenizer.json")
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    end = tokenizer.get_vocab()[END_OF_TEXT] if given is None else given.end
    meta = {"files": len(documents), "vocab_size": tokenizer.get_vocab_size()}
    for part, texts in (("train", train), ("validation", validation)):
        tokens = _encode(tokenizer, texts, end)
        np.save(directory / f"{part}.npy", tokens)
        meta[f"{part}_bytes"] = sum(len(text.encode()) for text in texts)
        meta[f"{part}_tokens"] = len(tokens)
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _publish(built: Path, target: Path) -> None:
    try:
        built.rename(target)
    except OSError:
        if not target.exists():  # else another process was first, and its result is as good
            raise


def _split(documents: Sequence[Document]) -> tuple[list[str], list[str]]:
    """Training and validation texts: whole files by a hash of their names, or with few files the tail of all text."""
    parts: tuple[list[str], list[str]] = [], []
    for name, text in documents:
        parts[zlib.crc32(os.fsencode(name)) % VALIDATION_SHARE == 0].append(text)
    return parts if all(parts) else _split_tail([text for _, text in documents])


def _split_tail(texts: list[str]) -> tuple[list[str], list[str]]:
    """``texts`` without their last twentieth, and that: whole texts from the end, then part of one, from a line on."""
    missing = sum(map(len, texts)) // VALIDATION_SHARE
    whole = len(texts)
    while len(texts[whole - 1]) <= missing:
        whole -= 1
        missing -= len(texts[whole])
    last = texts[whole - 1]
    tail = len(last) - missing
    cut = last.rfind("\n", 0, tail) + 1 or tail
    return [*texts[: whole - 1], last[:cut]], [last[cut:], *texts[whole:]]


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> "Tokenizer":
    tokenizers = import_extra("tokenizers", "train")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer: Tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return tokenizer


def _encode(tokenizer: "Tokenizer", texts: Sequence[str], end: int) -> Tokens:
    """The token ids of all texts in a row, each text closed by ``end``."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    pieces = [piece for text in texts for piece in (*_pieces(text), "")]  # "" has no tokens: it stands for the end
    ids: list[Tokens] = []
    for start in range(0, len(pieces), PIECES_PER_SLICE):
        encodings = tokenizer.encode_batch(pieces[start : start + PIECES_PER_SLICE], add_special_tokens=False)
        ids.extend(np.array(encoding.ids or [end], dtype=dtype) for encoding in encodings)
    return np.concatenate(ids)


def _pieces(text: str) -> Iterator[str]:
    """``text`` in pieces that bound the memory of one encoding, cut at line ends where there are any."""
    start = 0
    while start < len(text):
        stop = start + PIECE_CHARACTERS
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _count_windows(part: str, tokens: Tokens, seq_len: int) -> int:
    """How many windows of ``seq_len`` inputs and their targets ``tokens`` holds, overlapping ones included."""
    windows = len(tokens) - seq_len
    if windows < 1:
        raise ValueError(
            f"the {part} part has tokens={len(tokens)}, too few for one sequence of seq_len={seq_len} "
            f"(seq_len + 1 tokens with its targets): give more text or a smaller seq_len"
        )
    return windows


def _cut_windows(tokens: Tokens, starts: NDArray[np.int64], seq_len: int) -> Batch:
    windows = torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
