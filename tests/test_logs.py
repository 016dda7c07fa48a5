"""Log lines of several ranks: which are shown, and with which rank."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from scripts.logs import current_rank, log_to_stderr, logger
from src import Group, simulate


@pytest.fixture(autouse=True)
def logger_left_as_found() -> Iterator[None]:
    before = logger().handlers[:], logger().level
    yield
    logger().handlers[:], logger().level = before


def speak(group: Group) -> None:
    assert current_rank() == group.rank
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logger().log(level, "said by %d", group.rank)


@pytest.mark.parametrize(
    "level, shown",
    [
        ("debug", [(r, kind) for r in (0, 1) for kind in ("DEBUG", "INFO", "WARNING")]),
        ("info", [(0, "INFO"), (0, "WARNING"), (1, "WARNING")]),
        ("error", []),
    ],
)
def test_rank_0_speaks_and_the_others_warn(
    level: str, shown: list[tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    log_to_stderr("debug")
    log_to_stderr(level)
    simulate(speak, 2)
    out, err = capsys.readouterr()
    lines = [re.fullmatch(r"\d\d:\d\d:\d\d \[rank (\d)\] (\w+) said by \1", line) for line in err.splitlines()]
    assert out == "" and sorted((int(line[1]), line[2]) for line in lines if line) == shown
    assert len(lines) == len(shown)


def test_before_there_is_a_group_the_environment_names_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert current_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert current_rank() == 3
