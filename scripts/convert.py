"""Converts a Llama model between Hugging Face's format, Meta's, and checkpoints of this package.

    python -m scripts.convert SOURCE TARGET --to hugging-face
    torchrun --nproc-per-node 4 -m scripts.convert SOURCE TARGET --to checkpoint

What SOURCE is, is found by what it holds: config.json with safetensors files (hugging-face), params.json with
consolidated.*.pth (meta), or isoshard.json with the files of torch.distributed.checkpoint (checkpoint). With several
ranks each holds its part of the model alone. Tokenizer and generation settings are copied along.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .extras import import_extra
from .ranks import Parser, one_sentence, run_ranks

if TYPE_CHECKING:
    from src.distributed import Group

FORMATS = ("hugging-face", "checkpoint", "meta")
DTYPES = ("float32", "bfloat16", "float16")


def gibibytes(text: str) -> int:
    """So many GiB in bytes."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return math.ceil(number * 2**30)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    head, _, rest = (__doc__ or "").partition("\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m scripts.convert", description=head + rest, formatter_class=formatter)
    parser.add_argument("source", type=Path, help="directory of a model, or a checkpoint of a training run")
    parser.add_argument("target", type=Path, help="directory to make")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format of the target")
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="of the weights on the way and in the target (%(default)s)"
    )
    parser.add_argument("--max-file-size", type=gibibytes, default=5 * 2**30, help="GiB per safetensors file (5)")
    return parser.parse_args(arguments)


def convert(group: Group, options: argparse.Namespace) -> None:
    """Read the source and write the target, with a bar on rank 0."""
    import torch

    from src.formats.slices import local_slices

    from .models import copy_companions, format_of, open_model, write_model

    quiet = group.rank > 0
    began = time.perf_counter()
    kind = format_of(options.source)
    if options.target.exists():
        raise ValueError(f"{options.target} exists; choose another path, or remove it first")
    changes = {"rope_pairing": "neighbours"} if options.to == "meta" and kind == "hugging-face" else None
    with Bar("reading", quiet) as bar:
        dtype = getattr(torch, options.dtype)
        model = open_model(options.source, group, dtype=dtype, changes=changes, report=bar.report)
    with Bar("writing", quiet) as bar:
        write_model(options.target, model, options.to, group, bar.report, options.max_file_size)
    if group.rank == 0:
        copied = copy_companions(options.source, options.target)
        parameters = sum(torch.Size(item.shape).numel() for item in local_slices(model, group))
        print(
            f"{kind} -> {options.to}: {parameters:,} parameters in {time.perf_counter() - began:.1f} s"
            + (f"; with {', '.join(copied)}" if copied else "")
        )


class Bar:
    """A bar of bytes; silent on all ranks but one."""

    def __init__(self, what: str, quiet: bool) -> None:
        tqdm = import_extra("tqdm", "hf").tqdm
        self._bar = tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=quiet)

    def report(self, name: str, size: int) -> None:
        """One more tensor."""
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update(size)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.set_postfix_str("")
        self._bar.close()


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse(arguments)
    with one_sentence():
        run_ranks(convert, options, device="cpu")


if __name__ == "__main__":
    main()
