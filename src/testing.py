"""The pytest plugin, which runs tests on several ranks (docs/testing.md), and what tests import.

It has the entry point ``isoshard``, so every pytest beside this package loads it: torch comes with the first ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .rank_pool import RankFailed, RankPool
from .rank_runs import Ranks

if TYPE_CHECKING:
    import pytest

__all__ = ["RankFailed", "RankPool", "Ranks"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option and settings, unless this plugin is there under another name already."""
    try:
        parser.getgroup("isoshard").addoption(
            "--ranks-backend",
            metavar="NAMES",
            help="where tests marked with ranks run: simulated, gloo, nccl, or several of them with commas between",
        )
    except ValueError:
        return
    parser.addini("ranks_backend", "default of --ranks-backend", default="simulated")
    parser.addini("ranks_timeout", "seconds after which ranks are taken to hang and are ended", default="120")


def pytest_configure(config: pytest.Config) -> None:
    """Register the hooks and fixtures, once."""
    from .pytest_ranks import RankTests

    if not config.pluginmanager.has_plugin("isoshard ranks"):
        config.pluginmanager.register(RankTests(config), "isoshard ranks")
