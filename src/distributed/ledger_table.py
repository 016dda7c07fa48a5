"""A ledger as plain text: one row per module, phase and operation; rows of similar layers are folded into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .origin import Phase

_HEADER = ("module", "phase", "op", "count", "payload", "on the wire")
_TEXTS = 3
_INDEX = re.compile(r"(|.*\.)(\d+)(|\..*)")


@dataclass(frozen=True)
class Row:
    """``count`` collectives of one module, phase and operation, and the bytes of all of them together on one rank."""

    module: str
    phase: Phase
    op: str
    count: int
    payload: int
    wire: int


def text_table(rows: Iterable[Row]) -> str:
    """The table of ``rows``, added up: modules in order of first use, then totals forward, backward and of both.

    A run of layers that differ in their index alone is one row, ``layers.0-31.attention``, with the sums of the run.
    """
    added = _by_module(rows)
    totals = [("total", p, "", *_amounts([row for row in added if row.phase == p])) for p in ("forward", "backward")]
    body = [(row.module or "(no module)", row.phase, row.op, *_amounts([row])) for row in _fold(added)]
    cells = [_HEADER, *body, *totals, ("total", "", "", *_amounts(added))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(_line(line, widths) for line in cells)


def human_bytes(size: float) -> str:
    """``size`` bytes in binary units: ``64.0 MiB``."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    exponent = 0
    while size >= 1023.95 and exponent < len(units) - 1:
        size, exponent = size / 1024, exponent + 1
    return f"{size:.{min(exponent, 1)}f} {units[exponent]}"


def _by_module(rows: Iterable[Row]) -> list[Row]:
    modules: dict[str, dict[tuple[Phase, str], list[Row]]] = {}
    for row in rows:
        modules.setdefault(row.module, {}).setdefault((row.phase, row.op), []).append(row)
    return [_sum(module, alike) for module, kinds in modules.items() for alike in kinds.values()]


def _fold(rows: Iterable[Row]) -> list[Row]:
    """Each run of neighbouring layers with the same amounts as one row, in the place of the first."""
    runs: list[list[Row]] = []
    latest: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found = _INDEX.fullmatch(row.module)
        key = (found[1], found[3], row.phase, row.op) if found else (row.module, row.phase, row.op)
        run = latest.get(key)
        if run is not None and _neighbours(run[-1], row):
            run.append(row)
        else:
            runs.append([row])
            latest[key] = runs[-1]
    return [_sum(_run_name(run), run) for run in runs]


def _neighbours(row: Row, other: Row) -> bool:
    alike = (row.count, row.payload, row.wire) == (other.count, other.payload, other.wire)
    return alike and abs(_layer(row) - _layer(other)) == 1


def _layer(row: Row) -> int:
    found = _INDEX.fullmatch(row.module)
    return int(found[2]) if found else -1


def _run_name(run: Sequence[Row]) -> str:
    found = _INDEX.fullmatch(run[0].module)
    if found is None or len(run) == 1:
        return run[0].module
    layers = sorted(map(_layer, run))
    return f"{found[1]}{layers[0]}-{layers[-1]}{found[3]}"


def _sum(module: str, rows: Sequence[Row]) -> Row:
    count, payload, wire = (sum(amounts) for amounts in zip(*((r.count, r.payload, r.wire) for r in rows), strict=True))
    return Row(module, rows[0].phase, rows[0].op, count, payload, wire)


def _amounts(rows: Sequence[Row]) -> tuple[str, str, str]:
    count, payload, wire = (sum(getattr(row, name) for row in rows) for name in ("count", "payload", "wire"))
    return f"{count:,}", human_bytes(payload), human_bytes(wire)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    texts = [cell.ljust(width) for cell, width in zip(cells[:_TEXTS], widths, strict=False)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[_TEXTS:], widths[_TEXTS:], strict=True)]
    return "  ".join([*texts, *numbers])
