"""What layers cost on one CPU thread, beside the libraries that people know: side by side in one run.

    python -m scripts.bench.layers [rows]              rows whose name contains one of the words; all without any
    python -m scripts.bench.layers --no-units linear   as without units for bfloat16 (oneDNN kept to AVX2)

Contenders take turns, the order changing every round; times are of the thread's own CPU, medians over the rounds. The
ratio is the median of each round's own (ours / peer), with quartiles: "met" or "missed" where all three are on one
side of the bar, "tie" where it lies between the quartiles. Cross-entropy is that of one rank, in a group of one.
``scripts/bench/peers.sh`` installs the peers.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from src import functional
from src.kernels import cpu_linear
from src.modeling import vocab_parallel_cross_entropy

from . import peers, table

EPS = 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Race:
    """Two contenders, the bar for ours / peer, what to do before each run outside the clock, and runs per round."""

    ours: Callable[[], object]
    peer: Callable[[], object]
    bar: float
    prepare: Callable[[], object] = lambda: None
    repeat: int = 1
    memory_bar: float | None = None


def forward(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` without gradients."""
    return torch.no_grad()(call)


def learning(call: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], None]:
    """Forward and backward of ``call(*leaves)``."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def run() -> None:
        call(*leaves).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return run


class _Made(torch.autograd.Function):
    """A tensor as if an operation had made it, for free."""

    @staticmethod
    def forward(ctx: object, anchor: Tensor, made: list[Tensor]) -> Tensor:
        return made[0].detach()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(()), None


def consuming(call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward of ``call(x)``, which writes over ``x``."""
    anchor = torch.zeros((), requires_grad=True)
    return lambda: call(_Made.apply(anchor, [x])).backward(grad)  # type: ignore[no-untyped-call]


def linear(mode: str) -> Race:
    """With units for bfloat16 both are ``F.linear``."""
    bar = 1.0 if cpu_linear.has_bfloat16_units() else {"fwd": 0.25, "fwd+bwd": 0.06}[mode]
    x, weight = torch.randn(256, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
    if mode == "fwd":
        return Race(forward(lambda: functional.linear(x, weight)), forward(lambda: F.linear(x, weight)), bar)
    grad = torch.randn(256, 1024).bfloat16()
    return Race(learning(functional.linear, [x, weight], grad), learning(F.linear, [x, weight], grad), bar)


def norm(shape: tuple[int, ...], size: int, mode: str, bar: float) -> Race:
    x, weight, grad = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return functional.group_rms_norm(x, weight, size, EPS)

    def peer(x: Tensor, weight: Tensor) -> Tensor:
        if size == shape[-1]:
            return F.rms_norm(x, (size,), weight, EPS)
        return peers.grouped_rms_norm(x, weight, size, EPS)

    if mode == "fwd":
        return Race(forward(lambda: ours(x, weight)), forward(lambda: peer(x, weight)), bar, repeat=200)
    return Race(learning(ours, [x, weight], grad), learning(peer, [x, weight], grad), bar)


def bf16_norm() -> Race:
    x, weight = torch.randn(4, 1024, 2048).bfloat16(), torch.randn(2048).bfloat16()
    peer = peers.llama_rms_norm(weight, EPS)
    return Race(forward(lambda: functional.rms_norm(x, weight, EPS)), forward(lambda: peer(x)), 0.30)


def embedding(shape: tuple[int, int], mode: str, bar: float) -> Race:
    """Rank 0 of 2 of a vocabulary of 32768, before the all-reduce."""
    table, ids, grad = torch.randn(16384, 1024), torch.randint(0, 32768, shape), torch.randn(*shape, 1024)

    def ours(table: Tensor) -> Tensor:
        return functional.shard_embedding(ids, table, 0)

    def peer(table: Tensor) -> Tensor:
        return peers.megatron_embedding(ids, table, 0)

    if mode == "fwd":
        return Race(forward(lambda: ours(table)), forward(lambda: peer(table)), bar)
    return Race(learning(ours, [table], grad), learning(peer, [table], grad), bar)


def rotation(shape: tuple[int, int, int, int], bar: float, compiled: bool = False) -> Race:
    """Queries and keys ``[b, s, heads, head_dim]``."""
    q, k, grad = (torch.randn(shape) for _ in range(3))
    cos, sin = functional.rope_tables(shape[1], shape[3], 10000.0)
    theirs, per_row = peers.llama_rotation(), [table.expand(shape[0], -1, -1) for table in (cos, sin)]
    rotate = torch.compile(functional.apply_rotary_pos_emb) if compiled else functional.apply_rotary_pos_emb

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return join(rotate(q, cos, sin), rotate(k, cos, sin))

    def peer(q: Tensor, k: Tensor) -> Tensor:
        rotated = theirs(q.transpose(1, 2), k.transpose(1, 2), *per_row)
        return join(*(part.transpose(1, 2) for part in rotated))

    return Race(learning(ours, [q, k], grad), learning(peer, [q, k], grad), bar)


class _Join(torch.autograd.Function):
    """Two outputs as one, for free: the gradient goes to both."""

    @staticmethod
    def forward(ctx: object, a: Tensor, b: Tensor) -> Tensor:
        return a.view_as(a)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def join(a: Tensor, b: Tensor) -> Tensor:
    """``a``, with the gradient going to ``b`` as well."""
    joined: Tensor = _Join.apply(a, b)  # type: ignore[no-untyped-call]
    return joined


def cross_entropy(columns: int, mode: str, dtype: str, bar: float) -> Race:
    """1024 tokens. Without ``consuming`` the peer, which writes over float32 logits, gets a copy of them."""
    logits, targets = torch.randn(1024, columns).to(DTYPES[dtype]), torch.randint(0, columns, (1024,))
    buffer, grad, theirs = logits.clone(), torch.rand(1024), peers.megatron_cross_entropy()

    def ours(logits: Tensor, inplace: bool = False) -> Tensor:
        options: dict[str, Any] = {"reduction": "none", "inplace_backward": inplace}
        return vocab_parallel_cross_entropy(logits, targets, group=None, **options)

    def peer(logits: Tensor) -> Tensor:
        return theirs(logits.clone() if dtype == "fp32" else logits, targets)

    if mode == "fwd":
        call = forward(lambda: ours(logits))
        return Race(call, forward(lambda: theirs(buffer, targets)), bar, lambda: buffer.copy_(logits))
    if mode == "fwd+bwd consuming":
        mine = consuming(partial(ours, inplace=True), buffer, grad)
        return Race(mine, consuming(lambda x: theirs(x, targets), buffer, grad), bar, lambda: buffer.copy_(logits))
    memory_bar = 0.5 if dtype == "bf16" else None
    return Race(learning(ours, [logits], grad), learning(peer, [logits], grad), bar, memory_bar=memory_bar)


def cross_entropy_beside_dtensor(columns: int) -> Race:
    """1024 tokens in bfloat16."""
    logits, targets = torch.randn(1024, columns).bfloat16(), torch.randint(0, columns, (1024,))
    grad = torch.rand(1024)

    def ours(logits: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits, targets, group=None, reduction="none")

    peer = peers.dtensor_cross_entropy(logits, targets, grad.bfloat16())
    return Race(learning(ours, [logits], grad), peer, 0.35)


MEDIUM, LARGE = (2, 512, 1024), (4, 1024, 2048)
ROWS: dict[str, Callable[[], Race]] = {
    "linear bf16 256x1024x1024 fwd": lambda: linear("fwd"),
    "linear bf16 256x1024x1024 fwd+bwd": lambda: linear("fwd+bwd"),
    "norm decode fp32 fwd": lambda: norm((1, 1, 1024), 1024, "fwd", 1.10),
    "norm medium fp32 fwd+bwd": lambda: norm(MEDIUM, 1024, "fwd+bwd", 0.65),
    "norm large fp32 fwd+bwd": lambda: norm(LARGE, 2048, "fwd+bwd", 0.55),
    "norm groups medium fp32 fwd+bwd": lambda: norm(MEDIUM, 128, "fwd+bwd", 0.65),
    "norm groups large fp32 fwd+bwd": lambda: norm(LARGE, 128, "fwd+bwd", 0.55),
    "norm large bf16 fwd": bf16_norm,
    "embedding medium fp32 fwd": lambda: embedding((2, 512), "fwd", 0.40),
    "embedding large fp32 fwd": lambda: embedding((4, 1024), "fwd", 0.40),
    "embedding medium fp32 fwd+bwd": lambda: embedding((2, 512), "fwd+bwd", 0.35),
    "embedding large fp32 fwd+bwd": lambda: embedding((4, 1024), "fwd+bwd", 0.35),
    "rope halves large fp32 fwd+bwd": lambda: rotation((4, 1024, 16, 128), 0.50),
    "rope medium fp32 fwd+bwd, compiled": lambda: rotation((2, 512, 16, 64), 0.25, compiled=True),
    "cross-entropy 32K fp32 fwd": lambda: cross_entropy(2**15, "fwd", "fp32", 0.60),
    "cross-entropy 128K fp32 fwd": lambda: cross_entropy(2**17, "fwd", "fp32", 0.60),
    "cross-entropy 32K fp32 fwd+bwd": lambda: cross_entropy(2**15, "fwd+bwd", "fp32", 0.75),
    "cross-entropy 32K fp32 consuming": lambda: cross_entropy(2**15, "fwd+bwd consuming", "fp32", 0.90),
    "cross-entropy 128K fp32 consuming": lambda: cross_entropy(2**17, "fwd+bwd consuming", "fp32", 0.90),
    "cross-entropy 32K bf16 fwd+bwd": lambda: cross_entropy(2**15, "fwd+bwd", "bf16", 0.75),
    "cross-entropy 32K bf16 / DTensor": lambda: cross_entropy_beside_dtensor(2**15),
}


def milliseconds(race: Race, call: Callable[[], object]) -> float:
    """Of this thread's CPU for one ``call``."""
    race.prepare()
    began = time.thread_time()
    for _ in range(race.repeat):
        call()
    return (time.thread_time() - began) / race.repeat * 1e3


def resident(kind: str) -> float:
    """MiB of this process by the kernel's account: ``VmRSS`` now, ``VmHWM`` at most."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def peak(call: Callable[[], object]) -> float:
    """MiB by which the process grows during ``call``."""
    STATUS.with_name("clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def show(name: str, race: Race, rounds: int) -> None:
    """Run a race and print its row."""
    contenders = [partial(milliseconds, race, call) for call in (race.ours, race.peer)]
    print(table.row(name, list(table.rounds(contenders, rounds)), race.bar), flush=True)
    if race.memory_bar is None:
        return
    mine, theirs = peak(race.ours), peak(race.peer)
    if theirs:  # else malloc has kept what was freed
        ratio = mine / theirs
        numbers = f"{mine:9.1f} {theirs:9.1f} {ratio:6.2f} {'':13} {race.memory_bar:5.2f}"
        print(f"{'  peak, MiB':{table.WIDTH}} {numbers}  {table.verdict(ratio, ratio, race.memory_bar)}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="words in the names of rows")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each race (%(default)s)")
    parser.add_argument("--no-units", action="store_true", help="as on a processor without units for bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.no_units:
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    print(
        f"units for bfloat16: {'not used' if options.no_units else 'yes' if cpu_linear.has_bfloat16_units() else 'no'}"
    )
    print(table.header())
    with patch.object(cpu_linear, "has_bfloat16_units", lambda: False) if options.no_units else nullcontext():
        for name, build in ROWS.items():
            if options.rows and not any(word in name for word in options.rows):
                continue
            try:
                torch.manual_seed(0)
                show(name + ", no units" * options.no_units, build(), options.rounds)
            except peers.Missing as missing:
                print(f"{name:{table.WIDTH}} no peer: {missing}", flush=True)


if __name__ == "__main__":
    main()
