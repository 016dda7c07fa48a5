"""What same bits cost: a training step with logical shards fixed over one with the default, side by side in one run.

    python -m scripts.bench.same_bits

Both models live in the same processes and take turns, step by step; the ratio is the median over the rounds of each
round's own ratio, with its quartiles.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from src import Group
from src.modeling import ModelArgs, Transformer
from src.testing import RankPool
from src.training import train_step

SHARDS = 8


@dataclass(frozen=True)
class Size:
    """A model and a batch."""

    name: str
    dim: int
    layers: int
    vocab_size: int
    batch_size: int
    seq_len: int


TOY = Size("toy", dim=64, layers=2, vocab_size=512, batch_size=2, seq_len=32)
USEFUL = Size("useful", dim=512, layers=2, vocab_size=8192, batch_size=2, seq_len=256)


class Contender:
    """One model with its optimizer; ``step`` gives the milliseconds of a training step."""

    def __init__(self, size: Size, group: Group, dtype: torch.dtype) -> None:
        args = ModelArgs(
            dim=size.dim, n_layers=size.layers, n_heads=8, vocab_size=size.vocab_size, max_seq_len=size.seq_len
        )
        self.group, self.model = group, Transformer(args, group=group, dtype=dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        ids = torch.randint(size.vocab_size, (size.batch_size, size.seq_len + 1), generator=torch.Generator())
        self.batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def step(self) -> float:
        began = time.perf_counter()
        train_step(self.model, self.optimizer, [self.batch], group=self.group)
        return (time.perf_counter() - began) * 1e3


def race(group: Group, size: Size, dtype: torch.dtype, rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of (default, shards fixed) in each round, the order changing every time."""
    fast = Contender(size, group, dtype)
    fixed = Contender(size, Group(num_shards=SHARDS), dtype)
    times = []
    for i in range(rounds + 2):
        order = (fast, fixed) if i % 2 else (fixed, fast)
        taken = {contender: contender.step() for contender in order}
        times.append((taken[fast], taken[fixed]))
    return times[2:]


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row per size, dtype and number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="gloo, one thread each (1 2)")
    options = parser.parse_args(argv)
    pools = {n: RankPool("gloo", n, timeout=1800) for n in options.processes}
    row = "{:7} {:9} {:>3} {:>12} {:>14} {:>7}  {}"
    print(row.format("size", "dtype", "tp", "default ms", f"{SHARDS} shards ms", "ratio", "quartiles"))
    for size in (TOY, USEFUL):
        for dtype in (torch.float32, torch.bfloat16):
            for n, pool in pools.items():
                times = pool.run(race, size, dtype, options.rounds)[0]
                ratios = [fixed / fast for fast, fixed in times]
                low, _, high = quantiles(ratios, n=4)
                fast, fixed = (f"{median(column):.1f}" for column in zip(*times, strict=True))
                name = str(dtype).removeprefix("torch.")
                print(row.format(size.name, name, n, fast, fixed, f"{median(ratios):.2f}", f"{low:.2f} .. {high:.2f}"))
    for pool in pools.values():
        pool.close()


if __name__ == "__main__":
    main()
