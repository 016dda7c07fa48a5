"""What simulated ranks cost: a collective against bare threads, many ranks, and checks among real processes.

    python -m scripts.bench.simulation

Contenders take turns within a run; figures are medians over the rounds, with quartiles.
"""

import argparse
import functools
import os
import resource
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import median, quantiles

import torch
import torch.distributed as dist

from src import Group, init, simulate
from src.modeling import ModelArgs, Transformer
from src.testing import RankPool
from src.training import train_step

FLOATS = 1024
CALLS = 50


def reduce_often(group: Group | None = None) -> float:
    """Seconds for CALLS all-reduces, as rank 0 sees them."""
    tensor = torch.ones(FLOATS)
    dist.all_reduce(tensor)
    began = time.perf_counter()
    for _ in range(CALLS):
        dist.all_reduce(tensor)
    return time.perf_counter() - began


def simulated(ranks: int) -> float:
    """Microseconds of one all-reduce for each rank."""
    return float(simulate(reduce_often, ranks)[0]) / CALLS / ranks * 1e6


def reduced_by(pool: RankPool) -> float:
    """Microseconds of one all-reduce among the processes of ``pool``."""
    return float(pool.run(reduce_often)[0]) / CALLS * 1e6


def bare_threads(ranks: int) -> float:
    """The same, for threads that do nothing but meet, add and go on."""
    tensors, meeting, seconds = [torch.ones(FLOATS) for _ in range(ranks)], threading.Barrier(ranks), [0.0] * ranks

    def body(rank: int) -> None:
        meeting.wait()
        began = time.perf_counter()
        for _ in range(CALLS):
            if meeting.wait() == 0:
                total = torch.stack(tensors).sum(0)
                for tensor in tensors:
                    tensor.copy_(total)
            meeting.wait()
        seconds[rank] = time.perf_counter() - began

    threads = [threading.Thread(target=body, args=[rank]) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds[0] / CALLS / ranks * 1e6


def llama_steps(group: Group, steps: int) -> list[float]:
    """Seconds of each training step of a small model, one head for each rank."""
    size = group.world_size
    args = ModelArgs(dim=8 * size, n_layers=2, n_heads=size, vocab_size=4 * size, multiple_of=size, max_seq_len=16)
    model = Transformer(args, group=group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, seconds = torch.arange(33).view(1, 33) % args.vocab_size, []
    for _ in range(steps):
        began = time.perf_counter()
        train_step(model, optimizer, [(ids[:, :16].contiguous(), ids[:, 1:17].contiguous())], group=group)
        seconds.append(time.perf_counter() - began)
    return seconds


def check_from_now_on(group: Group, port: int) -> None:
    """Replace the default group of a worker by one whose calls are checked."""
    rank, size = group.rank, group.world_size
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    init(check=True, device="cpu", timeout=timedelta(seconds=60))


def measure(contenders: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """``rounds`` results of each contender, in turns."""
    results: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, found in zip(contenders, results, strict=True):
            found.append(contender())
    return results


def show(name: str, ranks: int, ours: list[float], theirs: list[float]) -> None:
    """One row: medians in microseconds, and their ratio round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    times = f"{median(ours):10.1f} {median(theirs):10.1f}"
    print(f"{name:28} {ranks:5} {times} {median(ratios):7.2f}  {low:.2f} .. {high:.2f}")


def checked_against_plain(ranks: int, rounds: int, port: int) -> None:
    """A row for real processes over gloo, with and without checks."""
    plain, checked = RankPool("gloo", ranks), RankPool("gloo", ranks)
    try:
        checked.run(check_from_now_on, port)
        ours, theirs = (functools.partial(reduced_by, pool) for pool in (checked, plain))
        show("gloo checked / unchecked", ranks, *measure([ours, theirs], rounds))
    finally:
        plain.close()
        checked.close()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each comparison (%(default)s)")
    parser.add_argument("--port", type=int, default=29611, help="a free port (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"all-reduce of {FLOATS} floats, microseconds (simulated: per rank)\n")
    print(f"{'contenders':28} {'ranks':>5} {'ours':>10} {'theirs':>10} {'ratio':>7}  quartiles")
    for ranks in (2, 4, 8, 16, 64):
        contenders = [functools.partial(simulated, ranks), functools.partial(bare_threads, ranks)]
        show("simulated / bare threads", ranks, *measure(contenders, options.rounds))
    for ranks in (2, 4):
        checked_against_plain(ranks, options.rounds, options.port + ranks)
    print("\nsmall Llama step, 2 layers, one head per rank\n")
    for ranks in (8, 64, 256):
        seconds = simulate(llama_steps, ranks, 4)[0]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{ranks:4} simulated ranks: {median(seconds[1:]) * 1e3:8.0f} ms/step, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
