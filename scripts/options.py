"""The command line of the training job."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .logs import LEVELS
from .ranks import Parser

SHARDS_HELP = (
    "logical shards, a power of two that the number of ranks divides: fixes the bits at every number of ranks, "
    "with one thread per rank (default: one shard per rank, bits as they come)"
)

MODEL_HELP = (
    "start from the model in DIR, in Hugging Face's or Meta's format or a checkpoint, with its tokenizer; "
    "its shape replaces the options below (random weights)"
)


@dataclass(frozen=True)
class Options:
    """What one training run is made of; one command-line option each."""

    out: Path
    resume: bool
    data: Path | None
    model: Path | None
    cache: Path
    vocab_size: int
    layers: int
    dim: int
    heads: int
    kv_heads: int | None
    multiple_of: int
    tie_embeddings: bool
    dropout: float
    seq_len: int
    batch_size: int
    accumulate: int
    steps: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    loss_block_tokens: int | None
    dtype: str
    seed: int
    eval_every: int
    eval_batches: int
    save_every: int
    prompt: str
    new_tokens: int
    temperature: float
    simulate: int | None
    num_shards: int | None
    dp: int
    dp_mode: str
    sequence_parallel: bool
    threads: int | None
    device: str | None
    backend: str | None
    timeout: float | None
    check: bool | None
    log_level: str


def parse_options(description: str | None, argv: Sequence[str] | None = None) -> Options:
    """Options from the command line; ends the program with a message when they make no sense."""
    parser = Parser(
        prog="python -m scripts.train", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs/train"), help="directory of the run (%(default)s)")
    run.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out, if any")
    run.add_argument("--steps", type=int, default=400, help="optimizer steps in all (%(default)s)")
    run.add_argument("--seed", type=int, default=42, help="of weights and batches (%(default)s)")
    run.add_argument("--eval-every", type=int, default=50, metavar="STEPS", help="validate so often (%(default)s)")
    run.add_argument("--eval-batches", type=int, default=8, help="batches of a validation (%(default)s)")
    run.add_argument("--save-every", type=int, default=200, metavar="STEPS", help="checkpoint so often (%(default)s)")

    text = parser.add_argument_group("text")
    text.add_argument("--data", type=Path, default=None, help="text file or directory (Python's standard library)")
    text.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where tokens are kept (%(default)s)")
    text.add_argument("--vocab-size", type=int, default=4096, help="of the byte-level BPE (%(default)s)")

    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="DIR", help=MODEL_HELP)
    model.add_argument("--layers", type=int, default=2, help="(%(default)s)")
    model.add_argument("--dim", type=int, default=128, help="hidden size (%(default)s)")
    model.add_argument("--heads", type=int, default=8, help="(%(default)s)")
    model.add_argument("--kv-heads", type=int, default=None, help="key and value heads (as many as --heads)")
    model.add_argument("--multiple-of", type=int, default=128, help="rounds the feed-forward size (%(default)s)")
    model.add_argument("--tie-embeddings", action="store_true", help="the head shares the embedding's table")
    model.add_argument("--dropout", type=float, default=0.0, help="(%(default)s)")
    model.add_argument("--seq-len", type=int, default=128, help="tokens of a sequence (%(default)s)")

    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--batch-size", type=int, default=16, help="sequences of a micro-batch (%(default)s)")
    optimizer.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step (%(default)s)")
    optimizer.add_argument("--lr", type=float, default=1e-2, help="peak learning rate (%(default)s)")
    optimizer.add_argument("--warmup", type=int, default=20, metavar="STEPS", help="(%(default)s)")
    optimizer.add_argument("--weight-decay", type=float, default=0.1, help="(%(default)s)")
    optimizer.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (%(default)s)")
    optimizer.add_argument("--loss-block-tokens", type=int, metavar="N", help="hold logits of N tokens at a time (all)")
    optimizer.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrix products")

    sample = parser.add_argument_group("sample")
    sample.add_argument("--prompt", default="import os\n\n\ndef", help="what the trained model continues")
    sample.add_argument("--new-tokens", type=int, default=80, help="tokens of the sample (%(default)s)")
    sample.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (%(default)s)")

    ranks = parser.add_argument_group("ranks")
    ranks.add_argument("--simulate", type=int, default=None, metavar="N", help="run N ranks in this process")
    ranks.add_argument("--num-shards", type=int, default=None, metavar="V", help=SHARDS_HELP)
    ranks.add_argument("--dp", type=int, default=1, metavar="N", help="data-parallel groups of ranks (%(default)s)")
    ranks.add_argument("--dp-mode", choices=["ddp", "fsdp"], default="ddp", help="whole copies or slices (%(default)s)")
    ranks.add_argument("--sequence-parallel", action="store_true", help="cut activations along the sequence, too")
    ranks.add_argument("--threads", type=int, default=None, help="intra-op threads of each rank (1 with --num-shards)")
    ranks.add_argument("--device", default=None, help="cpu or cuda (cuda where there is one)")
    ranks.add_argument("--backend", default=None, help="gloo or nccl (nccl on cuda)")
    ranks.add_argument("--timeout", type=float, default=None, metavar="SECONDS", help="of a collective (8 on gloo)")
    ranks.add_argument("--check", action="store_true", default=None, help="ranks compare each call before it is made")
    ranks.add_argument(
        "--log-level", choices=LEVELS, default="info", help="of rank 0; others warn only, but at debug (%(default)s)"
    )

    arguments = parser.parse_args(argv)
    for name in (
        "steps",
        "eval_every",
        "eval_batches",
        "save_every",
        "layers",
        "heads",
        "seq_len",
        "batch_size",
        "accumulate",
        "dp",
    ):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(arguments, name)}")
    for name in ("lr", "clip", "loss_block_tokens", "threads", "num_shards", "simulate", "timeout"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {value}")
    for name in ("seed", "warmup", "temperature", "new_tokens"):
        if getattr(arguments, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, not {getattr(arguments, name)}")
    if arguments.dp > 1 and arguments.num_shards is not None:
        parser.error(
            f"--num-shards fixes the bits, which a sum over --dp {arguments.dp} changes; leave one of them out"
        )
    if arguments.model is None and arguments.dim % (2 * arguments.heads):
        parser.error(
            f"--dim {arguments.dim} cannot be cut into --heads {arguments.heads} of an even width; "
            f"choose a multiple of {2 * arguments.heads}"
        )
    if not arguments.prompt:
        parser.error("--prompt must not be empty")
    return Options(**vars(arguments))
