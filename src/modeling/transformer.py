"""A Llama-style decoder: vocabulary-parallel at both ends, tensor-parallel in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.group import group_or_single
from ..distributed.random import SEED_STRIDE, model_seed
from ..functional import causal_mask
from .attention import Mask
from .block import TransformerBlock
from .config import ModelArgs
from .lm_head import LMHead
from .norm import RMSNorm
from .pos_emb import RotaryFrequencies
from .vocab_emb import ParallelVocabEmbedding


class Transformer(nn.Module):
    """``ids [b, s]`` to logits sharded over the vocabulary, ``[b, s, v/w]``.

    With ``group=None`` this is an ordinary single-process model. ``sequence_parallel`` keeps the activations between
    attention and feed-forward cut along the sequence, into V pieces at every world size. Every parameter draws from a
    stream of its own, found from ``seed``; with the group's ``num_shards`` fixed, the weights are the same at every
    world size. A tied table has a standard deviation of ``dim^-0.5``, so that logits start small.

    Raises ValueError for an unset ``vocab_size`` and for sizes that the logical shards do not divide.
    """

    def __init__(
        self,
        args: ModelArgs,
        *,
        group: Any = None,
        sequence_parallel: bool = False,
        seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        if args.vocab_size < 1:
            raise ValueError(f"vocab_size={args.vocab_size}: set it in ModelArgs before building a model")
        self.args, self.group, self.sequence_parallel = args, group_or_single(group), sequence_parallel
        base = model_seed(seed)
        options: dict[str, Any] = {"dtype": dtype, "device": device, "sequence_parallel": sequence_parallel}
        self.tok_embeddings = ParallelVocabEmbedding(
            args.vocab_size,
            args.dim,
            process_group=self.group,
            pad_vocab=args.pad_vocab,
            init_std=args.dim**-0.5 if args.tie_embeddings else 1.0,
            init_base_seed=base,
            **options,
        )
        self.layers = nn.ModuleList(
            TransformerBlock(i, args, group=self.group, init_base_seed=base, **options) for i in range(args.n_layers)
        )
        self.norm = RMSNorm(args.dim, args.norm_eps, group=self.group, **options)
        self.output = LMHead(
            args.dim,
            args.vocab_size,
            group=self.group,
            pad_vocab=args.pad_vocab,
            tied_weight=self.tok_embeddings.weight if args.tie_embeddings else None,
            init_base_seed=base + SEED_STRIDE,
            **options,
        )
        self.frequencies = RotaryFrequencies(args, device)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as after ``to_empty`` on a model that was built on the meta device."""
        self.tie_parameters()
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None and module is not self:
                reset()

    def tie_parameters(self) -> None:
        """Let a tied head share the embedding's table again, from which ``to_empty`` parts it."""
        if self.args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @contextmanager
    def evaluating(self, whole_sequences: bool = False) -> Iterator[None]:
        """Evaluation mode and no gradients for a while.

        ``whole_sequences`` turns sequence parallelism off meanwhile, as for decoding, whose steps are too short to cut.
        """
        training = self.training
        self.eval()
        cut: list[Any] = [m for m in self.modules() if whole_sequences and getattr(m, "sequence_parallel", False)]
        for module in cut:
            module.sequence_parallel = False
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)
            for module in cut:
                module.sequence_parallel = True

    def forward(
        self,
        tokens: Tensor,
        start_pos: int = 0,
        *,
        padding: Tensor | None = None,
        targets: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """``tokens [b, s] -> logits [b, s, v/w]``, causal, the first token being at position ``start_pos``.

        ``start_pos > 0`` continues from the KV cache, which is filled by calls under ``torch.no_grad()``. ``padding
        [b]`` is the number of fillers at the start of each row's sequence: no token sees them, positions are counted
        from the first real token, and their own logits mean nothing.

        With ``targets [b, s]`` it gives their cross-entropy instead, of the same bits, and logits do not outlive it;
        ``options`` are those of ``vocab_parallel_linear_cross_entropy``, as ``block_tokens``.

        Raises ValueError for ids outside the vocabulary and for positions beyond ``max_seq_len``.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be [b, s], got a tensor of shape {list(tokens.shape)}")
        length = tokens.shape[1]
        if start_pos < 0 or start_pos + length > self.args.max_seq_len:
            raise ValueError(
                f"start_pos={start_pos} + {length} positions must lie in [0, max_seq_len={self.args.max_seq_len}]"
            )
        if self.sequence_parallel and length % self.group.num_shards:
            shards = self.group.num_shards
            raise ValueError(f"sequence_parallel: num_shards={shards} must divide the sequence length {length}")
        h = self.tok_embeddings(tokens)
        mask: Mask = "causal" if length > 1 else None
        if padding is not None or (length > 1 and start_pos > 0):
            mask = causal_mask(length, start_pos, padding=padding, dtype=h.dtype, device=h.device)
        freqs_cis = self.frequencies(start_pos, length, padding)
        for layer in self.layers:
            h = layer(h, start_pos, freqs_cis, mask)
        output: Tensor = self.output(self.norm(h), targets, **options)
        return output
