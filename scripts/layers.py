"""What each layer sends: its collectives forward and backward, as a Ledger records them on simulated ranks.

    python -m scripts.layers                    four ranks
    python -m scripts.layers --tp 4 --num-shards 8

A batch of 2 sequences of 16 tokens, width 64, 8 heads, a vocabulary of 1000, float32.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src import Group, Ledger

BATCH, LENGTH, WIDTH, HEADS, VOCABULARY = 2, 16, 64, 8, 1000
ROW = "{:46}  {:26}  {}"
Row = tuple[str, list[str], list[str]]
Case = tuple[str, "Callable[[], Tensor]"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for every layer."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=4, metavar="N", help="simulated ranks (%(default)s)")
    parser.add_argument("--num-shards", type=int, default=None, metavar="V", help="logical shards (as many as ranks)")
    options = parser.parse_args(argv)
    print(ROW.format("layer", "forward", "backward").rstrip())
    for name, forward, backward in rows(options.tp, options.num_shards):
        for line in zip_longest([name], forward, backward, fillvalue=""):
            print(ROW.format(*line).rstrip())


def rows(world_size: int, num_shards: int | None = None) -> list[Row]:
    """Layer, collectives forward, collectives backward."""
    from src import simulate

    found: list[Row] = simulate(record, world_size, num_shards=num_shards)[0]
    return found


def record(group: Group) -> list[Row]:
    """Run every case on this rank, forward and backward, under a ledger of its own."""
    from src import Ledger

    found = []
    for name, run in cases(group):
        with Ledger() as ledger:
            run().sum().backward()
        found.append((name, summary(ledger, "forward"), summary(ledger, "backward")))
    return found


def summary(ledger: Ledger, phase: str) -> list[str]:
    """``2 all_reduce 8.0 KiB`` for each operation and payload; ``-`` for nothing."""
    from src.distributed.ledger_table import human_bytes

    sent = Counter((r.op, r.payload_bytes) for r in ledger.records if r.phase == phase)
    return [f"{count} {op} {human_bytes(size)}" for (op, size), count in sent.items()] or ["-"]


def cases(group: Group) -> Iterator[Case]:
    """Name and forward pass of each layer; ``[s]`` marks sequence parallelism, where x is a part of the sequence."""
    import torch

    from src import modeling as m

    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    part = torch.randn(BATCH, LENGTH // group.world_size, WIDTH, requires_grad=True)
    own = torch.randn(BATCH, LENGTH, WIDTH // group.world_size, requires_grad=True)
    logits = torch.randn(BATCH, LENGTH, VOCABULARY // group.world_size, requires_grad=True)

    def case(layer: nn.Module, name: str, *inputs: Any) -> Case:
        return name, lambda: layer(*inputs)

    for mark, cut, value in (("", False, x), (" [s]", True, part)):
        options: dict[str, Any] = {"group": group, "sequence_parallel": cut}
        embedding = m.ParallelVocabEmbedding(VOCABULARY, WIDTH, process_group=group, sequence_parallel=cut)
        yield case(embedding, f"ParallelVocabEmbedding{mark}", ids)
        yield case(m.ColumnParallelLinear(WIDTH, WIDTH, **options), f"ColumnParallelLinear{mark}", value)
        yield case(m.RowParallelLinear(WIDTH, WIDTH, **options), f"RowParallelLinear{mark}", own)
        yield case(m.RMSNorm(WIDTH, **options), f"RMSNorm{mark}", value)
        for kv_heads in (HEADS, 2):
            attention = m.Attention(arguments(kv_heads), **options)
            yield case(attention, f"Attention, {kv_heads} kv heads{mark}", value, 0, angles())
        yield case(m.FeedForward(WIDTH, 4 * WIDTH, 32, **options), f"FeedForward{mark}", value)
        yield case(m.TransformerBlock(0, arguments(HEADS), **options), f"TransformerBlock{mark}", value, 0, angles())
        yield case(m.LMHead(WIDTH, VOCABULARY, **options), f"LMHead{mark}", value)

    column = m.ColumnParallelLinear(WIDTH, WIDTH, group=group, gather_output=True)
    yield case(column, "ColumnParallelLinear, gather_output", x)
    row = m.RowParallelLinear(WIDTH, WIDTH, group=group, input_is_parallel=False)
    yield case(row, "RowParallelLinear, input_is_parallel=False", x)
    shard = WIDTH // group.num_shards
    yield case(m.GroupRMSNorm(WIDTH, shard, group=group), f"GroupRMSNorm, groups of {shard}: one shard", own)
    yield case(m.GroupRMSNorm(WIDTH, 2 * shard, group=group), f"GroupRMSNorm, groups of {2 * shard}: two shards", own)
    yield case(m.ParallelDropout(0.1, group=group), "ParallelDropout", x)
    for name, smoothing in (("", 0.0), (", label smoothing", 0.1)):
        loss: dict[str, Any] = {"group": group, "label_smoothing": smoothing}
        yield (
            f"vocab_parallel_cross_entropy{name}",
            lambda loss=loss: m.vocab_parallel_cross_entropy(logits, ids, **loss),  # type: ignore[misc]
        )


def arguments(kv_heads: int) -> Any:
    from src.modeling import ModelArgs

    return ModelArgs(dim=WIDTH, n_heads=HEADS, n_kv_heads=kv_heads, multiple_of=32)


def angles() -> Tensor:
    from src.modeling import precompute_freqs_cis

    return precompute_freqs_cis(WIDTH // HEADS, LENGTH)


if __name__ == "__main__":
    main()
