"""Continues text with a Llama model, tensor-parallel.

    python -m scripts.generate --model DIR --prompt "Once upon"
    torchrun --nproc-per-node 4 -m scripts.generate --model DIR --prompt "Once upon"
    python -m scripts.generate --model DIR --prompt "Once upon" --simulate 4

DIR holds a model of Hugging Face's or Meta's format, or a checkpoint of scripts.train, and its tokenizer.json. The text
goes to standard output, everything else to standard error. A single prompt's text appears as it is made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .ranks import Parser, one_sentence, run_ranks

DTYPES = ("float32", "bfloat16", "float16")
STOP_HELP = "text of a token to stop at, beside the model's own; repeat the option for several"
SHARDS_HELP = "logical shards: the same bits at every number of ranks that divides V (one per rank)"


def positive(text: str) -> int:
    """A whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m scripts.generate", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory of the model")
    add("--prompt", action="append", required=True, help="text to continue; repeat the option for a batch")
    add("--max-new-tokens", type=positive, default=64, help="(%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (%(default)s)")
    add("--top-k", type=positive, metavar="K", help="draw from the K likeliest tokens only (all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="from the likeliest that hold P of the probability (all)")
    add("--seed", type=int, default=0, help="of the draws (%(default)s)")
    add("--stop", action="append", default=[], help=STOP_HELP)
    add("--ignore-eos", action="store_true", help="do not stop at the model's own end of text")
    add("--dtype", default="float32", choices=DTYPES, help="of the weights (%(default)s)")
    add("--num-shards", type=positive, metavar="V", help=SHARDS_HELP)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--simulate", type=positive, metavar="N", help="N simulated ranks in this process")
    where.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    options = parser.parse_args(arguments)
    if options.temperature == 0 and (options.top_k is not None or options.top_p != 1):
        parser.error("--top-k and --top-p choose among draws, and none is made; pass --temperature 1, too")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse(arguments)
    with one_sentence():
        from .continuation import run

        run_ranks(run, options, simulated=options.simulate, num_shards=options.num_shards, device=options.device)


if __name__ == "__main__":
    main()
