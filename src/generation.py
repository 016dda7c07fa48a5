"""Text from a model: one token after another, through the KV cache, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .modeling import Transformer
from .sampling import Sampling, next_tokens


def generate(
    model: Transformer,
    prompts: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield the next ids ``[b]`` after ``prompts``, ``max_new_tokens`` times or until every row has stopped.

    ``prompts`` is ``[b, s]``, or ids of unequal lengths, which are filled up at the start and continue as they would
    alone. ``temperature`` 0 takes the likeliest token; otherwise tokens are drawn as ``Sampling`` says, with a
    generator of ``seed``, alike on all ranks. A row that has yielded one of the ``stop`` ids goes on yielding it.

    Raises ValueError for an empty prompt, for values out of range, and when prompt and new tokens exceed the model's
    ``max_seq_len``.
    """
    device = model.frequencies.inverse.device
    tokens, padding = _aligned(prompts, device)
    length, limit = tokens.shape[1], model.args.max_seq_len
    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 0 or length + max_new_tokens > limit:
        raise ValueError(
            f"prompt of {length} tokens + max_new_tokens={max_new_tokens} exceed the model's max_seq_len={limit}"
        )
    generator = torch.Generator(device).manual_seed(seed)
    ends = torch.tensor(stop, dtype=torch.long, device=device)
    return _generate(model, tokens, padding, max_new_tokens, sampling, ends, generator)


def _aligned(prompts: Tensor | Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """``[b, s]`` with fillers at the start of short rows, and how many; None where all rows are of one length."""
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2:
            raise ValueError(f"the prompt must be [b, s], got a tensor of shape {list(prompts.shape)}")
        rows = [list(row) for row in prompts.tolist()]
    else:
        rows = [list(row) for row in prompts]
    if not rows or not all(rows):
        raise ValueError("the prompt is empty; begin with at least one token")
    longest = max(map(len, rows))
    fillers = [longest - len(row) for row in rows]
    tokens = torch.tensor([[0] * missing + row for missing, row in zip(fillers, rows, strict=True)], device=device)
    return tokens, torch.tensor(fillers, device=device) if any(fillers) else None


def _generate(
    model: Transformer,
    tokens: Tensor,
    padding: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    ends: Tensor,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    position, stopped, last = 0, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device), tokens[:, -1]
    for _ in range(max_new_tokens):
        with model.evaluating(whole_sequences=True):
            logits = model(tokens, position, padding=padding)[:, -1]
        position += tokens.shape[1]
        fresh = next_tokens(logits, sampling, model.args.vocab_size, generator, group=model.group)
        last = torch.where(stopped, last, fresh)
        stopped = stopped | torch.isin(last, ends)
        yield last
        if stopped.all():
            return
        tokens = last.unsqueeze(1)
