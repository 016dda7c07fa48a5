"""What a Llama 3 model needs on each rank of a tensor-parallel group, and what a training step sends.

    python -m scripts.plan --model llama3-8b --tp 8

The model of this library runs forward, loss and backward on the meta device, as simulated ranks: nothing is allocated,
and every collective and every tensor kept for backward is one that training would make. Prints memory per rank, the
ledger of one step, and an estimate of the time that communication takes on the given links; draws a chart.

Attention is counted as a fused kernel keeps it, without its scores. Temporary tensors, fragmentation and the CUDA
context come on top. Latencies default to those that NCCL's tuning assumes for NVLink and for a network, rates to
NVLink of an H100 and to one 400 Gb/s adapter per GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import import_extra
from .ranks import one_sentence

if TYPE_CHECKING:
    from .planning import Job, RankPlan

# Grattafiori et al. 2024, "The Llama 3 Herd of Models", table 3.
LLAMA3 = {"n_kv_heads": 8, "vocab_size": 128256, "rope_theta": 500000, "norm_eps": 1e-5}
MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": LLAMA3 | {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3},
    "llama3-70b": LLAMA3 | {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
    "llama3-405b": LLAMA3
    | {"dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2},
}
CHART_SIZES = (1, 2, 4, 8)
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677")
GIB = 2**30


@dataclass(frozen=True)
class Options:
    """The command line; ``alpha`` in microseconds and ``bandwidth`` in GB/s, inside a node and across nodes."""

    model: str
    tp: int
    batch_size: int
    seq_len: int
    dtype: str
    num_shards: int | None
    sequence_parallel: bool
    master_weights: bool
    alpha: list[float]
    bandwidth: list[float]
    node_ranks: int
    out: Path


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Options from the command line; ends the program with a message when they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama3-8b", help="(%(default)s)")
    parser.add_argument("--tp", type=int, default=8, metavar="N", help="ranks of the group (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of a step (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of all but AdamW")
    parser.add_argument("--num-shards", type=int, default=None, metavar="V", help="logical shards (as many as ranks)")
    parser.add_argument("--sequence-parallel", action="store_true", help="cut activations along the sequence, too")
    parser.add_argument("--master-weights", action="store_true", help="AdamW keeps a float32 copy of the weights")
    links = parser.add_argument_group("links, inside a node and across nodes")
    options: dict[str, Any] = {"type": float, "nargs": 2, "metavar": ("INSIDE", "ACROSS")}
    links.add_argument("--alpha", default=[3.4, 9.6], help="microseconds per message (3.4 9.6)", **options)
    links.add_argument(
        "--bandwidth", default=[450.0, 50.0], help="1 / beta: GB/s of a GPU, one way (450 50)", **options
    )
    links.add_argument("--node-ranks", type=int, default=8, metavar="N", help="GPUs of a node (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/plan.png"), help="the chart (%(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("tp", "batch_size", "seq_len", "num_shards", "node_ranks"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if arguments.master_weights and arguments.dtype == "float32":
        parser.error("--master-weights are float32 copies; the weights of --dtype float32 need none")
    return Options(**vars(arguments))


def main(argv: Sequence[str] | None = None) -> None:
    """Print and draw the plan that the command line asks for."""
    options = parse_options(argv)
    with one_sentence():
        from .planning import plan_rank

        job = make_job(options)
        plan = plan_rank(job, options.tp)
        print(describe(options, plan))
        others = [plan_rank(job, size) for size in chart_sizes(options)]
        draw(sorted([plan, *others], key=lambda plan: plan.tp), options, options.out)
    print(f"chart {options.out}")


def make_job(options: Options) -> Job:
    """The step that ``options`` describe."""
    import torch

    from src.modeling import ModelArgs

    from .planning import Job

    return Job(
        ModelArgs(**MODELS[options.model]),
        options.batch_size,
        options.seq_len,
        getattr(torch, options.dtype),
        options.num_shards,
        options.sequence_parallel,
        options.master_weights,
    )


def chart_sizes(options: Options) -> list[int]:
    """Other sizes to draw beside ``--tp``."""
    shards = options.num_shards
    return [n for n in CHART_SIZES if n != options.tp and (shards is None or shards % n == 0)]


def describe(options: Options, plan: RankPlan) -> str:
    """Memory, ledger and estimate as text."""
    from src.distributed.ledger_table import human_bytes

    memory = plan.memory | {"training, in all": sum(plan.memory.values())}
    memory |= {"KV cache": plan.kv_cache, "generation: parameters, KV cache": plan.memory["parameters"] + plan.kv_cache}
    lines = [f"{name:34}{human_bytes(size):>11}" for name, size in memory.items()]
    return "\n".join(
        [
            f"{options.model}: {plan.all_parameters:,} parameters, {plan.parameters:,} on each of {plan.tp} rank(s)",
            f"{options.dtype}, {options.batch_size} x {options.seq_len:,} tokens",
            "",
            "memory of a rank",
            *lines,
            "",
            "what a rank sends in a step",
            str(plan.ledger),
            *(["", *predict(options, plan)] if plan.tp > 1 else []),
        ]
    )


def predict(options: Options, plan: RankPlan) -> list[str]:
    """The estimate for groups of several sizes, and its formula."""
    from src.distributed.prediction import FORMULA, Link

    places: list[tuple[str, int | None]] = [("inside a node", options.node_ranks), ("across nodes", None)]
    levels = [
        (where, Link.of(microseconds=alpha, gigabytes_per_second=rate, ranks=reach), f"{alpha:g} µs, {rate:g} GB/s")
        for (where, reach), alpha, rate in zip(places, options.alpha, options.bandwidth, strict=True)
        if reach != 1
    ]
    return [
        f"estimated communication of a step; alpha, 1 / beta {'; '.join(f'{w}: {costs}' for w, _, costs in levels)}",
        *(f"  {estimate.interval}" for estimate in plan.ledger.predict([link for _, link, _ in levels])),
        FORMULA,
    ]


def draw(plans: Sequence[RankPlan], options: Options, path: Path) -> None:
    """Bars of memory by kind and of bytes sent, for each size of the group, into the image ``path``.

    Raises ImportError where matplotlib is missing.
    """
    figure = import_extra("matplotlib.figure", "train").Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    memory = {kind: [plan.memory[kind] / GIB for plan in plans] for kind in plans[0].memory}
    _stack(left, plans, memory, "memory of a rank in training (GiB)")
    sent = {
        phase: [sum(r.wire_bytes for r in plan.ledger.records if r.phase == phase) / GIB for plan in plans]
        for phase in ("forward", "backward")
    }
    _stack(right, plans, sent, "sent by a rank in a step (GiB)")
    figure.suptitle(f"{options.model}, {options.dtype}, {options.batch_size} x {options.seq_len:,} tokens", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _stack(axes: Any, plans: Sequence[RankPlan], kinds: dict[str, list[float]], label: str) -> None:
    """One bar per plan, stacked of ``kinds``, with its total on top."""
    names, bottoms = [f"tp {plan.tp}" for plan in plans], [0.0] * len(plans)
    for (kind, values), color in zip(kinds.items(), COLORS, strict=False):
        axes.bar(names, values, bottom=bottoms, color=color, label=kind, width=0.6)
        bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
    for name, total in zip(names, bottoms, strict=True):
        axes.annotate(f"{total:,.1f}", (name, total), ha="center", va="bottom", fontsize=9)
    axes.set_ylabel(label)
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
