"""The language-model head: hidden states to logits sharded over the vocabulary."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed.group import as_group
from ..sharding import padded_size, shard_size, valid_size
from .checks import check_activations
from .columns import column_products, copies
from .conversion import take_parameters
from .linear import ColumnParallelLinear
from .linear_loss import linear_cross_entropy, logits_cross_entropy
from .loss_terms import Criterion


class LMHead(ColumnParallelLinear):
    """A column-parallel linear, ``[v/w, h]``, whose logits ``[b, s, v/w]`` stay sharded.

    ``pad_vocab`` pads a vocabulary that does not divide; padding rows are zero, their logits -inf. ``tied_weight`` is
    the parameter of an embedding over the same group, which then is this layer's weight too. ``gather_output`` gives
    every rank all logits ``[b, s, v]``, without padding.

    Raises ValueError when the vocabulary does not divide and ``pad_vocab`` is not set.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        group: Any = None,
        bias: bool = False,
        gather_output: bool = False,
        pad_vocab: bool = False,
        tied_weight: nn.Parameter | None = None,
        sequence_parallel: bool = False,
        init_base_seed: int = 42,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        group = as_group(group)
        rows = padded_size(vocab_size, group.num_shards)
        if not pad_vocab:
            remedy = f"pass pad_vocab=True to pad it to {rows}"
            shard_size("vocab_size", vocab_size, group.num_shards, group.world_size, remedy)
        self.vocab_size, self.tied = vocab_size, tied_weight is not None
        options: dict[str, Any] = {"init_base_seed": init_base_seed, "dtype": dtype, "gather_output": gather_output}
        options |= {"sequence_parallel": sequence_parallel, "device": device}
        super().__init__(hidden_size, rows, bias=bias, group=group, **options)
        if tied_weight is not None:
            self.weight = tied_weight

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, group: Any = None, tied_weight: nn.Parameter | None = None, **options: Any
    ) -> Self:
        """As for ColumnParallelLinear; with ``tied_weight``, the weight of ``linear`` is not used."""
        layer = cls.shaped_like(linear, group=group, tied_weight=tied_weight, **options)
        take_parameters(layer, linear, None if tied_weight is None else {linear.weight: tied_weight})
        return layer

    def reset_parameters(self) -> None:
        """Draw this rank's logical shards anew; padding rows become zero. A tied weight is the embedding's to draw."""
        if self.tied:
            return
        super().reset_parameters()
        with torch.no_grad():
            first = self.group.rank * self.weight.shape[0]
            for parameter in self.parameters():
                parameter[max(self.vocab_size - first, 0) :].zero_()

    def forward(self, x: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        """``x [..., h] -> logits [..., v/w]``, or ``[..., v]`` with ``gather_output``.

        With ``targets [...]``, their cross-entropy instead; ``options`` as for ``vocab_parallel_linear_cross_entropy``.
        """
        if targets is not None:
            return self._loss(x, targets, **options)
        if options:
            raise TypeError(f"{', '.join(options)}: options of a loss, which needs targets")
        logits = super().forward(x)
        return logits[..., : self.vocab_size] if self.gather_output else logits

    def finish_shards(self, products: list[Tensor]) -> list[Tensor]:
        """The logits of padding are -inf, so that it never has any probability."""
        return [self._hide_padding(y, j) for y, j in zip(products, self.group.shards, strict=True)]

    def _loss(self, x: Tensor, targets: Tensor, *, block_tokens: int | None = None, **options: Any) -> Tensor:
        check_activations(x, self.in_features, "LMHead", self.sequence_parallel)
        criterion = Criterion(self.vocab_size, **options)
        how: dict[str, Any] = {"group": self.group, "sequence_parallel": self.sequence_parallel}
        if block_tokens is None:
            (logits,) = column_products(x, [self], **how)
            return logits_cross_entropy(logits, targets, self.group, criterion)
        inputs = copies(x, **how)
        return linear_cross_entropy(inputs, *self.shard_parameters(), targets, self.group, criterion, block_tokens)

    def _hide_padding(self, logits: Tensor, shard: int) -> Tensor:
        width = logits.shape[-1]
        real = valid_size(self.vocab_size, shard, width)
        return logits if real == width else F.pad(logits[..., :real], (0, width - real), value=-math.inf)

    def unpadded_sizes(self) -> dict[str, int]:
        """Real lengths of the sharded dims that may be padded."""
        return {"weight": self.vocab_size, "bias": self.vocab_size}
