"""What scripts.generate does on each rank: load the model, continue the prompts, show text and speed."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from src.distributed import Group, local_device
from src.generation import generate
from src.modeling import Transformer

from .extras import import_extra
from .models import args_of, companion, end_tokens, open_model


def run(group: Group, options: argparse.Namespace) -> list[list[int]]:
    """Continue the prompts; rank 0 prints. The new ids of each prompt, without the token it stopped at."""
    if options.num_shards is not None:
        torch.set_num_threads(1)
    args_of(options.model)  # refuses what is no model of ours before its tokenizer is missed
    tokenizer = open_tokenizer(options.model)
    prompts = [tokenizer.encode(text).ids for text in options.prompt]
    if not all(prompts):
        raise ValueError("a prompt is empty; begin with at least one token")
    stops = stop_tokens(options, tokenizer)
    length = max(map(len, prompts)) + options.max_new_tokens
    model = open_model(
        options.model,
        group,
        dtype=getattr(torch, options.dtype),
        device=local_device(options.device),
        changes={"max_seq_len": length, "max_batch_size": len(prompts)},
    )
    shown = group.rank == 0
    stream = Stream(tokenizer, prompts[0], shown and len(prompts) == 1)
    continuations, seconds = continued(model, prompts, stops, options, stream)
    if shown and len(prompts) > 1:
        for number, ids in enumerate(continuations, 1):
            print(f"--- {number} ---\n{tokenizer.decode(ids)}")
    if shown:
        report(prompts, continuations, seconds)
    return continuations


def continued(
    model: Transformer, prompts: list[list[int]], stops: list[int], options: argparse.Namespace, stream: Stream
) -> tuple[list[list[int]], list[float]]:
    """New ids per prompt up to its stop token, and the seconds that each step took."""
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows, seconds, began = set(range(len(prompts))), [], time.perf_counter()
    steps = generate(
        model,
        prompts,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=stops,
        seed=options.seed,
    )
    for ids in steps:
        fresh = ids.tolist()
        seconds.append(time.perf_counter() - began)
        open_rows -= {row for row in open_rows if fresh[row] in stops}
        for row in open_rows:
            rows[row].append(fresh[row])
        if 0 in open_rows:
            stream.show(fresh[0])
        began = time.perf_counter()
    stream.end()
    return rows, seconds


class Stream:
    """Prints the text of one continuation as its ids come; a character of several tokens appears when it is whole."""

    def __init__(self, tokenizer: Any, prompt: list[int], shown: bool) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._shown = tokenizer, shown
        self._decoder = DecodeStream(skip_special_tokens=True)
        for token in prompt:
            self._decoder.step(tokenizer, token)

    def show(self, token: int) -> None:
        """One more token."""
        text = self._decoder.step(self._tokenizer, token)
        if self._shown and text:
            print(text, end="", flush=True)

    def end(self) -> None:
        """The last line ends."""
        if self._shown:
            print(flush=True)


def report(prompts: list[list[int]], continuations: list[list[int]], seconds: list[float]) -> None:
    """Tokens per second of prefill, the first step, and of decode, all others, on standard error."""
    read, written = sum(map(len, prompts)), sum(map(len, continuations))
    parts = [f"prefill {read} tokens, {read / max(seconds[0], 1e-9):.0f} tokens/s"]
    if seconds[1:]:
        made = len(prompts) * len(seconds[1:])
        parts.append(f"decode {written} tokens, {made / max(sum(seconds[1:]), 1e-9):.0f} tokens/s")
    print("; ".join(parts), file=sys.stderr)


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of the model in ``path``.

    Raises ImportError that names the extra, and ValueError when there is no tokenizer.json.
    """
    tokenizers = import_extra("tokenizers", "hf")
    file = companion(path, "tokenizer.json")
    if file is None:
        raise ValueError(f"{path} has no tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        raise ValueError(f"cannot read {file}: {error}") from None


def stop_tokens(options: argparse.Namespace, tokenizer: Any) -> list[int]:
    """Ids at which a continuation ends: the model's own ends of text and those asked for.

    Raises ValueError for a text that is no single token.
    """
    stops = []
    for text in options.stop:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ValueError(f"--stop {text!r} is {len(ids)} tokens, not one")
        stops.append(ids[0])
    return stops if options.ignore_eos else stops + end_tokens(options.model)
