"""Text from a model: one token after another, through the KV cache, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .distributed.regions import gather_from_region
from .modeling import Transformer


def generate(
    model: Transformer, prompt: Tensor, max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
) -> Iterator[Tensor]:
    """Yield ``max_new_tokens`` times the next ids ``[b]`` after ``prompt [b, s]``.

    ``temperature`` 0 takes the most likely token; otherwise tokens are drawn from ``softmax(logits / temperature)``
    with a generator of ``seed``, alike on all ranks.

    Raises ValueError for an empty prompt, a negative temperature, and when prompt and new tokens exceed the model's
    ``max_seq_len``.
    """
    if prompt.dim() != 2:
        raise ValueError(f"the prompt must be [b, s], got a tensor of shape {list(prompt.shape)}")
    length, limit = prompt.shape[1], model.args.max_seq_len
    if length == 0:
        raise ValueError("the prompt is empty; begin with at least one token")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    if length + max_new_tokens > limit:
        raise ValueError(
            f"prompt of {length} tokens + max_new_tokens={max_new_tokens} exceed the model's max_seq_len={limit}"
        )
    return _generate(model, prompt, max_new_tokens, temperature, torch.Generator(prompt.device).manual_seed(seed))


def _generate(
    model: Transformer, tokens: Tensor, max_new_tokens: int, temperature: float, generator: torch.Generator
) -> Iterator[Tensor]:
    position = 0
    for _ in range(max_new_tokens):
        with model.evaluating(whole_sequences=True):
            logits = model(tokens, position)[:, -1]
        logits = gather_from_region(logits, group=model.group)[:, : model.args.vocab_size]
        position += tokens.shape[1]
        if temperature > 0:
            chances = (logits.float() / temperature).softmax(-1)
            tokens = torch.multinomial(chances, 1, generator=generator)
        else:
            tokens = logits.argmax(-1, keepdim=True)
        yield tokens.squeeze(1)
