"""Step time and efficiency of Llama 3 at tp = 1 ... 8 in a node of H200s, on paper: a prediction, not a measurement.

    python -m scripts.bench.scaling

What a rank sends is the ledger's, of a step on the meta device (``scripts.plan``). Kernels take what their operations
or bytes need at ceilings of an H200, 790 TFLOP/s of bfloat16 products and 4.3 TB/s of copies (noted figures, not runs
of this repository), and shares of those that are assumed: products 75 to 95 %, attention 45 to 70 %, everything else 85
to 95 %. A collective takes 15 us and its bytes on the wire at 370 to 450 GB/s, assumed for NVLink. "slow" adds the slow
ends, nothing overlapped; "fast" is the fast ends with communication wholly behind computation. Efficiency is throughput
per GPU over that of tp = 1, kernels fast at both: collectives slow and in the open, or fast and hidden. Data loading,
gradient synchronization among replicas and the host count nothing; nothing is recomputed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scripts.plan import MODELS
from scripts.planning import Job, RankPlan, plan_rank
from src.modeling import ModelArgs

SIZES = (1, 2, 4, 8)
MEMORY = 141e9
Range = tuple[float, float]


@dataclass(frozen=True)
class Machine:
    """Ceilings in operations and bytes per second; ranges are (slow, fast)."""

    products: float = 790e12
    copies: float = 4.3e12
    product_share: Range = (0.75, 0.95)
    attention_share: Range = (0.45, 0.70)
    copy_share: Range = (0.85, 0.95)
    latency: float = 15e-6
    wire: Range = (370e9, 450e9)


@dataclass(frozen=True)
class Work:
    """Of one rank and step: operations of products and of attention, bytes of all other kernels, messages and bytes."""

    products: float
    attention: float
    copied: float
    messages: int
    sent: int

    def times(self, batch_size: int) -> Work:
        """The same for as many sequences in one step; the optimizer counts with each of them."""
        b = batch_size
        return Work(b * self.products, b * self.attention, b * self.copied, self.messages, b * self.sent)

    def kernels(self, machine: Machine, end: int) -> float:
        """Seconds of computation, ``end`` 0 for slow and 1 for fast."""
        products = self.products / machine.product_share[end] + self.attention / machine.attention_share[end]
        return products / machine.products + self.copied / machine.copy_share[end] / machine.copies

    def collectives(self, machine: Machine, end: int) -> float:
        """Seconds of communication."""
        return self.messages * machine.latency + self.sent / machine.wire[end]


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step with slow and fast ends, and throughput per GPU over that of one."""

    tp: int
    slow: float
    fast: float
    efficiency: Range


def work_of(args: ModelArgs, plan: RankPlan, batch_size: int, seq_len: int, sequence_parallel: bool) -> Work:
    """Forward and backward, each tensor read or written once, and AdamW on bfloat16 weights with float32 moments."""
    n, h, w, layers = batch_size * seq_len, args.dim, plan.tp, args.n_layers
    heads, vocabulary = args.n_heads * args.head_dim // w, args.vocab_size * h // w
    matrices = plan.parameters - (2 * layers + 1) * h - vocabulary
    ffn = (matrices - vocabulary) / layers - 2 * h * (heads + args.kv_heads * args.head_dim / w)
    whole = n * h / (w if sequence_parallel else 1)
    # Norm 4 + 6, add and norm 8 + 8, residual 6 + 6: bytes of a channel, forward and backward. SwiGLU 6 + 10.
    layer = 38 * whole + 16 * n * ffn / (3 * h) + 2 * 4 * n * (heads + args.kv_heads * args.head_dim / w)
    loss = 6 * n * args.vocab_size / w + 10 * whole
    optimizer = (2 + 2 + 2 + 2 * 8) * plan.parameters
    records = plan.ledger.records
    return Work(
        products=6 * n * matrices,
        attention=7 * n * seq_len * heads * layers,  # half of all pairs: 2 n s forward, 5 n s backward
        copied=layers * layer + loss + optimizer,
        messages=len(records),
        sent=sum(record.wire_bytes for record in records),
    )


def predict(works: dict[int, Work], machine: Machine) -> list[Prediction]:
    """One prediction for each size, the first of which is what efficiency refers to."""
    alone = works[min(works)].kernels(machine, 1) * min(works)
    found = []
    for tp, work in works.items():
        (slow, fast), (sending, hidden) = (
            [f(machine, end) for end in (0, 1)] for f in (work.kernels, work.collectives)
        )
        efficiency = alone / tp / (fast + sending), alone / tp / max(fast, hidden)
        found.append(Prediction(tp, slow + sending, max(fast, hidden), efficiency))
    return found


def table(model: str, options: argparse.Namespace, machine: Machine) -> list[str]:
    """The rows of one model."""
    args = ModelArgs(**MODELS[model])
    job = Job(args, options.batch_size, options.seq_len, torch.bfloat16, sequence_parallel=options.sequence_parallel)
    plans = {tp: plan_rank(job, tp) for tp in SIZES}
    shape = options.batch_size, options.seq_len, options.sequence_parallel
    works = {tp: work_of(args, plan, *shape) for tp, plan in plans.items()}
    tokens = options.batch_size * options.seq_len
    lines = []
    for found in predict(works, machine):
        plan, work = plans[found.tp], works[found.tp]
        rates = [tokens / found.tp / seconds for seconds in (found.slow, found.fast)]
        memory = sum(plan.memory.values())
        low, high = found.efficiency
        mark = "" if memory < MEMORY else "(!)"
        lines.append(
            f"{model:11} {found.tp:2} {memory / 1e9:8,.0f} GB {mark:3} {work.sent / 1e9:7.2f} GB"
            f" {found.fast * 1e3:8,.0f} .. {found.slow * 1e3:6,.0f} ms {rates[0]:7,.0f} .. {rates[1]:6,.0f}"
            f"   {low:4.0%} .. {high:4.0%}"
        )
    return lines


def published(machine: Machine) -> list[str]:
    """The model beside figures of others; where it does not hold, it says so."""
    n, h, inner, w = 8192, 8192, 29568, 8
    sent = 2 * n * h * (w - 1) // w
    work = Work(products=2 * n * h * inner / w, attention=0, copied=0, messages=1, sent=sent)
    seconds = [work.kernels(machine, end) + work.collectives(machine, end) for end in (1, 0)]
    lines = [beside("product and reduce-scatter 8192 x 8192 x 29568, 8 H100, ms", 1.045, [s * 1e3 for s in seconds])]
    for model, batch, alone, vanilla, overlapped in (
        ("llama3-8b", 12, 6667, 4378, 4809),
        ("llama3-70b", 16, 0, 597, 652),
    ):
        args = ModelArgs(**MODELS[model])
        job = Job(args, 1, 8192, torch.bfloat16, sequence_parallel=True)
        works = {tp: work_of(args, plan_rank(job, tp), 1, 8192, True).times(batch) for tp in (1, 8)}
        low, high = predict(works, machine)[1].efficiency
        if alone:
            lines.append(
                beside(f"{model}, 64 H100, throughput per GPU at tp 8 over tp 1", vanilla / alone, [low, high])
            )
            lines.append(beside("  the same with overlap", overlapped / alone, [low, high]))
        lines.append(beside(f"{model}, tp 8, gain by overlap", overlapped / vanilla, [1.0, high / low]))
    return lines


def beside(what: str, figure: float, span: Sequence[float]) -> str:
    """One line of ``published``."""
    low, high = span
    verdict = "inside" if low <= figure <= high else "OUTSIDE"
    return f"{what:62} {figure:6.3f}  predicted {low:.3f} .. {high:.3f}  {verdict}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (llama3-8b llama3-70b)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of a step and replica (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--no-sequence-parallel", dest="sequence_parallel", action="store_false")
    parser.add_argument("--no-published", dest="published", action="store_false", help="leave out figures of others")
    options = parser.parse_args(argv)
    machine = Machine()
    print(f"prediction, not a measurement: {options.batch_size} x {options.seq_len} tokens, bfloat16, AdamW, one node")
    print(f"{'':11} tp      memory        sent            step      tokens/s per GPU   efficiency")
    for model in options.models or ("llama3-8b", "llama3-70b"):
        if model not in MODELS:
            parser.error(f"model {model!r} is none of {', '.join(MODELS)}")
        print("\n".join(table(model, options, machine)), flush=True)
    print("(!) more than the 141 GB of an H200: computed all the same, as throughput per GPU of a part of the model")
    if options.published:
        print("\nbeside published figures", *published(machine), sep="\n")


if __name__ == "__main__":
    main()
