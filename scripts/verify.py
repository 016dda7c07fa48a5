"""Prove that training has the same bits at every number of ranks, on this machine.

    python -m scripts.verify                    simulated 1, 2, 4, 8; gloo 2, 4; NCCL where there are GPUs
    python -m scripts.verify --matrix           the same for every variant of the model, in float32 and bfloat16
    python -m scripts.verify --mode fast        how far ordinary reductions drift apart, from the same weights

Trains on the real text for some steps in each place (the model, loss, clipping and AdamW of the training job), and
compares losses, logits, gradients and weights with those of the first place. Ends with "same bits", or names the first
tensor, step and element that differs, and exits with 1.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .ranks import one_sentence

if TYPE_CHECKING:
    from .tracing import Runner, Trace

VARIANTS = ("dense", "gqa", "tied", "uneven", "sequence", "dropout")

KINDS = {"loss": "losses", "logits": "logits", "gradient": "gradients", "weight": "weights"}
ROW = "{:10} {:10} {:>3}  {:10} {:10} {:10} {:10} {:>8}"


@dataclass(frozen=True)
class Options:
    """What to train, where, and for how long."""

    steps: int
    num_shards: int
    simulated: list[int]
    gloo: list[int]
    mode: str
    matrix: bool
    variant: str
    dtype: str
    threads: int
    cache: Path
    vocab_size: int
    dim: int
    layers: int
    batch_size: int
    seq_len: int


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def sizes(text: str) -> list[int]:
        return [int(size) for size in text.split(",") if size]

    parser.add_argument("--steps", type=int, default=5, help="optimizer steps in each place (%(default)s)")
    parser.add_argument("--num-shards", type=int, default=8, metavar="V", help="logical shards (%(default)s)")
    parser.add_argument("--simulated", type=sizes, default=[1, 2, 4, 8], metavar="N,N", help="(1,2,4,8)")
    parser.add_argument("--gloo", type=sizes, default=[2, 4], metavar="N,N", help="processes on the CPU (2,4)")
    parser.add_argument("--mode", choices=["invariant", "fast"], default="invariant", help="(%(default)s)")
    parser.add_argument("--matrix", action="store_true", help="every variant, in float32 and bfloat16")
    parser.add_argument("--variant", choices=VARIANTS, default="dense", help="(%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights, too")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads of each rank (%(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where tokens are kept (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="(%(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="hidden size (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--seq-len", type=int, default=64, help="(%(default)s)")
    options = Options(**vars(parser.parse_args(argv)))
    if options.steps < 1 or len(options.simulated) + len(options.gloo) < 2:
        parser.error("at least one step and two places are needed for a comparison")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run the proof that the command line describes."""
    options = parse_options(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it starts
    with one_sentence():
        prove(options)


def prove(options: Options) -> None:
    """Trace every variant in every place; ends the program with 1 where bits differ that are promised."""
    from .corpus import prepare
    from .tracing import Runner

    corpus = prepare(options.cache, options.vocab_size)
    chosen = [(options.variant, options.dtype)]
    if options.matrix:
        chosen = [(variant, dtype) for variant in VARIANTS for dtype in ("float32", "bfloat16")]
    differences = 0
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(corpus.path, Path(folder))
        for variant, dtype in chosen:
            differences += compare(runner, replace(options, variant=variant, dtype=dtype))
        runner.close()
    if options.mode == "fast":
        print("ordinary reductions: nothing is promised about these bits")
    elif differences:
        sys.exit(f"NOT the same bits: {differences} run(s) differ")
    else:
        print(f"same bits, {options.threads} thread(s) per rank")


def compare(runner: "Runner", options: Options) -> int:
    """Trace every place, print a row for each, and say how many differ from the first."""
    import torch

    places = [("simulated", n) for n in options.simulated] + [("gloo", n) for n in options.gloo]
    if torch.cuda.is_available():
        places += [("nccl", n) for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()]
    shards = f"{options.num_shards} logical shards" if options.mode == "invariant" else "one shard per rank"
    print(f"\n{options.variant}, {options.dtype}, {options.steps} steps, {shards}")
    print(ROW.format("mode", "place", "tp", *KINDS.values(), "ms/step"))
    references: dict[bool, Trace] = {}
    different = 0
    for place in places:
        trace = runner.trace(place, options)
        digests = (trace.digest(kind)[:10] for kind in KINDS)
        print(ROW.format(options.mode, *place, *digests, f"{trace.ms_per_step:.1f}"), flush=True)
        reference = references.setdefault(place[0] == "nccl", trace)  # a CPU and a GPU never give the same bits
        found = trace.first_difference(reference)
        if found:
            different += 1
            print(f"    first difference from the first row of its kind: {found}")
            print(f"    largest difference: {trace.drift(reference, 'loss'):.3g} in losses, ", end="")
            print(f"{trace.drift(reference, 'weight'):.3g} in weights")
    return different


if __name__ == "__main__":
    main()
