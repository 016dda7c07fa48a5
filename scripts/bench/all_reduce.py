"""All-reduce between processes of one host: through shared memory, and by gloo, side by side in one run.

    python -m scripts.bench.all_reduce              two ranks, and four for information
    python -m scripts.bench.all_reduce --ranks 2

Ours returns a new tensor, as ``isoshard.distributed.all_reduce`` does; gloo's ``dist.all_reduce`` works in place. Each
rank computes with one thread. In a round each contender makes as many calls as fill some milliseconds, and the slowest
rank counts; the order changes from round to round. Ratio, quartiles and verdict as in ``scripts.bench.table``.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from src import Group
from src.distributed import all_reduce
from src.testing import RankPool

from . import table

KIB, MIB = 2**10, 2**20
SIZES = {
    **dict.fromkeys((KIB, 16 * KIB, 256 * KIB), 0.12),
    **dict.fromkeys((MIB, 4 * MIB), 0.25),
    **dict.fromkeys((16 * MIB, 64 * MIB), 0.35),
}
"""Bytes of a message, and the bar for ours / gloo's between two ranks."""


def race(group: Group, nbytes: int, count: int) -> list[tuple[float, ...]]:
    """Milliseconds of one call of (ours, gloo's) on this rank in each round."""
    repeat = max(2, min(50, 8 * MIB // nbytes))
    ours, theirs = torch.zeros(nbytes // 4), torch.zeros(nbytes // 4)

    def through_memory() -> None:
        all_reduce(ours, group=group)

    def by_gloo() -> None:
        dist.all_reduce(theirs)

    def timed(call: Callable[[], None]) -> float:
        call()
        dist.barrier()
        began = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - began) / repeat * 1e3

    return list(table.rounds([lambda: timed(through_memory), lambda: timed(by_gloo)], count))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="numbers of processes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each race (%(default)s)")
    options = parser.parse_args()
    print(table.header())
    for ranks in options.ranks:
        pool = RankPool("gloo", ranks, timeout=600)
        try:
            for nbytes, bar in SIZES.items():
                rounds = zip(*pool.run(race, nbytes, options.rounds), strict=True)
                slowest = [tuple(map(max, zip(*of_ranks, strict=True))) for of_ranks in rounds]
                size = f"{nbytes // KIB} KiB" if nbytes < MIB else f"{nbytes // MIB} MiB"
                print(table.row(f"all-reduce, {ranks} ranks, {size}", slowest, bar if ranks == 2 else None), flush=True)
        finally:
            pool.close()


if __name__ == "__main__":
    main()
