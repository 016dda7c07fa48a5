"""What simulated ranks cost: a collective, a training step, many ranks, and checks among real processes.

    python -m scripts.bench.simulation [rows]          rows whose name contains one of the words; all without any

Contenders take turns, the order changing every round; medians, and the median of each round's own ratio with
quartiles, as in ``scripts.bench.layers``. Everything computes with one thread.

all-reduce: 4 KiB, microseconds per collective and rank. The peer is bare threads that meet, add and go on.
step, CPU: forward, backward and AdamW. The peer, "the ranks' own work", is as many copies of rank 0's part, stepped
one after the other in one thread, whose collectives return at once (torch's "fake" backend).
step, wall: the same. The peer is ``scripts.bench.local_tensor``, which must come to the same loss.
"""

import argparse
import functools
import os
import resource
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from statistics import median, quantiles

import torch
import torch.distributed as dist
from torch import Tensor

from src import Group, init, simulate
from src.modeling import ModelArgs, Transformer
from src.testing import RankPool
from src.training import batch_loss, train_step

from . import table
from .local_tensor import Model, all_ranks, fake_group

FLOATS = 1024
CALLS = 50
OVERHEAD = 60.0
"""Microseconds per collective and rank that simulation may cost."""

STEPS = 2
Clock = Callable[[], float]


def reduce_often(group: Group | None = None, clock: Clock = time.perf_counter) -> float:
    """Seconds for CALLS all-reduces, as rank 0 sees them."""
    tensor = torch.ones(FLOATS)
    dist.all_reduce(tensor)
    began = clock()
    for _ in range(CALLS):
        dist.all_reduce(tensor)
    return clock() - began


def simulated(ranks: int, clock: Clock) -> float:
    """Microseconds of one all-reduce for each rank."""
    return float(simulate(reduce_often, ranks, clock)[0]) / CALLS / ranks * 1e6


def reduced_by(pool: RankPool) -> float:
    """Microseconds of one all-reduce among the processes of ``pool``."""
    return float(pool.run(reduce_often)[0]) / CALLS * 1e6


def bare_threads(ranks: int, clock: Clock) -> float:
    """The same, for threads that do nothing but meet, add and go on."""
    tensors, meeting, seconds = [torch.ones(FLOATS) for _ in range(ranks)], threading.Barrier(ranks), [0.0] * ranks

    def body(rank: int) -> None:
        meeting.wait()
        began = clock()
        for _ in range(CALLS):
            if meeting.wait() == 0:
                total = torch.stack(tensors).sum(0)
                for tensor in tensors:
                    tensor.copy_(total)
            meeting.wait()
        seconds[rank] = clock() - began

    threads = [threading.Thread(target=body, args=[rank]) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds[0] / CALLS / ranks * 1e6


class Training:
    """Steps of one rank's part of a model of width 512 with 4 layers and 8192 tokens, on 2 sequences of 128."""

    args = ModelArgs(512, 4, 8, vocab_size=8192, multiple_of=64, max_seq_len=128, rope_pairing="halves")

    def __init__(self, group: Group) -> None:
        self.group, self.model = group, Transformer(self.args, group=group)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    @classmethod
    def batch(cls) -> tuple[Tensor, Tensor]:
        """Ids and targets."""
        ids = torch.randint(cls.args.vocab_size, (2, 129), generator=torch.Generator().manual_seed(0))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step(self) -> Tensor:
        """The loss before the step."""
        self.optimizer.zero_grad()
        loss = batch_loss(self.model, *self.batch(), group=self.group)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def timed_steps(group: Group, clock: Clock) -> tuple[float, float, float]:
    """When STEPS steps of all ranks began and ended, and the last loss."""
    training = Training(group)
    training.step()
    dist.barrier()
    began = clock()
    losses = [training.step() for _ in range(STEPS)]
    dist.barrier()
    return began, clock(), losses[-1].item()


def simulated_steps(ranks: int, clock: Clock, losses: list[float]) -> float:
    """Milliseconds of a step of all ranks."""
    began, ended, found = zip(*simulate(timed_steps, ranks, clock), strict=True)
    losses.append(found[0])
    return float(max(ended) - min(began)) / STEPS * 1e3


def own_work(ranks: int) -> float:
    """Milliseconds of CPU of a step of as many parts of the model that do not wait for each other."""
    with fake_group(ranks):
        parts = [Training(Group()) for _ in range(ranks)]
        for part in parts:
            part.step()
        began = time.process_time()
        for part in parts * STEPS:
            part.step()
        return (time.process_time() - began) / STEPS * 1e3


def local_tensor_steps(ranks: int, losses: list[float]) -> float:
    """Milliseconds of a step of all ranks in torch's LocalTensorMode."""
    args, shards = Training.args, simulate(lambda group: Transformer(Training.args, group=group).state_dict(), ranks)
    firsts = [torch.tensor(rank * args.vocab_size // ranks) for rank in range(ranks)]
    batch = Training.batch()  # inside the mode each rank would draw its own
    with all_ranks(ranks) as together:
        weights = {name: together([shard[name] for shard in shards]).requires_grad_() for name in shards[0]}
        model, optimizer = Model(args, weights, together(firsts)), torch.optim.AdamW(list(weights.values()), lr=1e-3)
        for turn in range(STEPS + 1):
            if turn == 1:
                began = time.perf_counter()
            optimizer.zero_grad()
            loss = model.loss(*batch)
            loss.backward()
            optimizer.step()
        seconds = time.perf_counter() - began
    losses.append(loss.reconcile().item())  # type: ignore[attr-defined]
    return seconds / STEPS * 1e3


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


def checked_calls(ranks: int, port: int, name: str, rounds: int) -> None:
    """A row for real processes over gloo, with and without checks."""
    plain, checked = RankPool("gloo", ranks), RankPool("gloo", ranks)
    try:
        checked.run(check_from_now_on, port)
        contenders = [functools.partial(reduced_by, pool) for pool in (checked, plain)]
        print(table.row(name, list(table.rounds(contenders, rounds))), flush=True)
    finally:
        plain.close()
        checked.close()


def calls(ranks: int, clock: Clock, name: str, rounds: int) -> None:
    """A row for simulated collectives, and with 8 ranks how they stand to OVERHEAD."""
    contenders = [functools.partial(contender, ranks, clock) for contender in (simulated, bare_threads)]
    results = list(table.rounds(contenders, rounds))
    print(table.row(name, results), flush=True)
    if ranks == 8:
        low, middle, high = quantiles([ours for ours, _ in results], n=4)
        numbers = f"{middle:9.3f} {'':16}  {low:.1f} .. {high:.1f}  {OVERHEAD:5.0f}"
        print(f"{'  against the bar in microseconds':{table.WIDTH}} {numbers}  {table.verdict(low, high, OVERHEAD)}")


def steps_by_cpu(ranks: int, name: str, rounds: int) -> None:
    """A row for training steps against the ranks' own work."""
    ours = functools.partial(simulated_steps, ranks, time.process_time, [])
    print(table.row(name, list(table.rounds([ours, functools.partial(own_work, ranks)], rounds)), 1.2), flush=True)


def steps_by_wall(ranks: int, name: str, rounds: int) -> None:
    """A row for training steps against LocalTensorMode; both come to the same loss."""
    losses: list[float] = []
    ours = functools.partial(simulated_steps, ranks, time.perf_counter, losses)
    peer = functools.partial(local_tensor_steps, ranks, losses)
    print(table.row(name, list(table.rounds([ours, peer], rounds)), 0.40), flush=True)
    assert max(losses) - min(losses) < 1e-4, losses


def many_ranks(ranks: int, name: str, rounds: int) -> None:
    """Time and memory of steps of a small Llama, one head for each rank."""
    seconds = simulate(llama_steps, ranks, 4)[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:{table.WIDTH}} {median(seconds[1:]) * 1e3:9.0f} ms, peak memory {peak:.2f} GiB", flush=True)


def rows(port: int) -> Iterator[tuple[str, Callable[..., None]]]:
    """Names, and what prints the row, given name and rounds."""
    for ranks in (2, 4, 8, 16, 64):
        yield f"all-reduce tp={ranks}, wall", functools.partial(calls, ranks, time.perf_counter)
    for ranks in (2, 4, 8):
        yield f"all-reduce tp={ranks}, CPU", functools.partial(calls, ranks, time.process_time)
    for ranks in (2, 4, 8):
        yield f"step tp={ranks}, CPU / own work", functools.partial(steps_by_cpu, ranks)
    for ranks in (2, 4, 8):
        yield f"step tp={ranks}, wall / LocalTensorMode", functools.partial(steps_by_wall, ranks)
    for ranks in (8, 64, 256):
        yield f"small Llama, {ranks} ranks", functools.partial(many_ranks, ranks)
    for ranks in (2, 4):
        yield f"gloo tp={ranks}, checked / unchecked", functools.partial(checked_calls, ranks, port + ranks)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="words in the names of rows")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each comparison (%(default)s)")
    parser.add_argument("--port", type=int, default=29611, help="a free port (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"all-reduce and gloo in microseconds, steps in milliseconds\n\n{table.header('')}")
    for name, show in rows(options.port):
        if not options.rows or any(word in name for word in options.rows):
            show(name=name, rounds=options.rounds)


if __name__ == "__main__":
    main()
