"""Train a Llama-style model, tensor-parallel.

    torchrun --nproc-per-node 2 -m scripts.train     two processes
    python -m scripts.train                          one process
    python -m scripts.train --simulate 2             two simulated ranks in one process

All three run the same job. The text is the source of Python's standard library unless --data names your own.
"""

from collections.abc import Sequence
from datetime import timedelta

from .logs import log_to_stderr
from .options import parse_options
from .ranks import one_sentence, run_ranks


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job that the command line describes."""
    options = parse_options(__doc__, argv)
    log_to_stderr(options.log_level)
    with one_sentence():
        from .job import train

        run_ranks(
            train,
            options,
            simulated=options.simulate,
            num_shards=options.num_shards,
            device=options.device,
            backend=options.backend,
            timeout=None if options.timeout is None else timedelta(seconds=options.timeout),
            check=options.check,
        )


if __name__ == "__main__":
    main()
