"""Continues text with a Llama model, tensor-parallel.

    python -m scripts.generate --model DIR --prompt "Once upon"
    torchrun --nproc-per-node 4 -m scripts.generate --model DIR --prompt "Once upon"
    python -m scripts.generate --model DIR --prompt "Once upon" --simulate 4

DIR holds a model of Hugging Face's or Meta's format, or a checkpoint of scripts.train, and its tokenizer.json. The text
goes to standard output, everything else to standard error. A single prompt's text appears as it is made.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def positive(text: str) -> int:
    """A whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="scripts.generate", description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory of the model")
    add("--prompt", action="append", required=True, help="text to continue; several make a batch")
    add("--max-new-tokens", type=positive, default=64, help="default: 64")
    add("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    add("--top-k", type=positive, help="draw from the K likeliest tokens only")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that hold P of the probability")
    add("--seed", type=int, default=0, help="of the draws")
    add("--stop", action="append", default=[], help="text of a token to stop at, beside the model's own")
    add("--ignore-eos", action="store_true", help="do not stop at the model's own end of text")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    add("--num-shards", type=positive, help="logical shards: the same bits at every number of ranks that divides it")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--simulate", type=positive, metavar="N", help="N simulated ranks in this process")
    where.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse(arguments)
    from src import SimulationError, close, init, simulate

    from .continuation import run

    try:
        if options.simulate is not None:
            simulate(run, options.simulate, options, num_shards=options.num_shards)
            return
        group = init(device=options.device, num_shards=options.num_shards)
        run(group, options)
        close()
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    except SimulationError as error:
        if not isinstance(error.__cause__, (ValueError, ImportError)):
            raise
        sys.exit(f"error: {error.__cause__}")


if __name__ == "__main__":
    main()
