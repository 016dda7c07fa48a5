"""Train a Llama-style model, tensor-parallel.

    torchrun --nproc-per-node 2 -m scripts.train     two processes
    python -m scripts.train                          one process
    python -m scripts.train --simulate 2             two simulated ranks in one process

All three run the same job. The text is the source of Python's standard library unless --data names your own.
"""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta

from .logs import log_to_stderr
from .options import parse_options


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job that the command line describes."""
    options = parse_options(__doc__, argv)
    log_to_stderr(options.log_level)
    from src import SimulationError, close, init, simulate

    from .job import train

    try:
        if options.simulate is not None:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError("--simulate runs all ranks in one process; start it without torchrun")
            simulate(train, options.simulate, options, num_shards=options.num_shards)
            return
        group = init(
            device=options.device,
            backend=options.backend,
            num_shards=options.num_shards,
            timeout=None if options.timeout is None else timedelta(seconds=options.timeout),
            check=options.check,
        )
        train(group, options)
        close()
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    except SimulationError as error:
        if not isinstance(error.__cause__, (ValueError, ImportError)):
            raise
        sys.exit(f"error: {error.__cause__}")


if __name__ == "__main__":
    main()
