"""Log lines of several ranks on standard error, each with its rank; results stay on standard output."""

from __future__ import annotations

import logging
import os
import sys

LEVELS = ("debug", "info", "warning", "error")
FORMAT = "%(asctime)s [rank %(rank)s] %(levelname)s %(message)s"


def logger() -> logging.Logger:
    """The logger of the library and these scripts; under ``isoshard run --simulate`` every rank has one of its own."""
    return logging.getLogger("isoshard")


def log_to_stderr(level: str) -> None:
    """Show what is logged: from ``level`` on for rank 0, from WARNING on for the other ranks.

    ``debug`` shows everything of every rank. Calling it again replaces what it did before.
    """
    for old in [handler for handler in logger().handlers if isinstance(handler, _RankHandler)]:
        logger().removeHandler(old)
    logger().addHandler(_RankHandler())
    logger().setLevel(level.upper())


class _RankHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Knows which rank speaks, also where ranks are threads of one process, and keeps off the progress bar."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter(FORMAT, "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        record.rank = rank = current_rank()
        if rank > 0 and record.levelno < logging.WARNING and logger().level > logging.DEBUG:
            return
        if "tqdm" in sys.modules and self.stream.isatty():
            with sys.modules["tqdm"].tqdm.external_write_mode(self.stream):
                super().emit(record)
        else:
            super().emit(record)


def current_rank() -> int:
    """The rank that calls, simulated or real; before a group is made, the one that the environment names."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        return int(dist.get_rank())
    return int(os.environ.get("RANK", "0"))
