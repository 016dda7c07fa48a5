"""Draws rows that the benchmarks printed: ours over the peer, with quartiles and bars.

python -m scripts.bench.chart build/bench/*.txt [--out docs/bench.svg]
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUMBER = r"\d+(?:\.\d+)?"
ROW = re.compile(
    rf"(?P<name>\S.*?) +{NUMBER} +{NUMBER} +(?P<ratio>{NUMBER}) +(?P<low>{NUMBER}) \.\. (?P<high>{NUMBER})"
    rf"(?: +(?P<bar>{NUMBER}) +(?P<verdict>met|missed|tie))$"
)
COLORS = {"met": "#4477aa", "tie": "#ccbb44", "missed": "#ee6677"}


@dataclass(frozen=True)
class Entry:
    """One row: medians and quartiles of ours / peer, the bar, and what became of it."""

    name: str
    ratio: float
    low: float
    high: float
    bar: float
    verdict: str


def read(path: Path) -> list[Entry]:
    """The rows with a bar in a table that a benchmark printed."""
    found = (ROW.match(line) for line in path.read_text().splitlines())
    numbers = ("ratio", "low", "high", "bar")
    return [
        Entry(name=row["name"], verdict=row["verdict"], **{part: float(row[part]) for part in numbers})
        for row in found
        if row
    ]


def draw(entries: list[Entry], out: Path) -> None:
    """A horizontal bar for each entry; black: quartiles, a grey mark: the bar to be met, a dashed line: the peer."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": "isoshard", "svg.fonttype": "none"}
    figure = Figure(figsize=(8, 0.6 + 0.24 * len(entries)), layout="constrained")
    axes: Any = figure.subplots()
    places = range(len(entries))[::-1]
    ratios = [entry.ratio for entry in entries]
    spread = [[e.ratio - e.low for e in entries], [e.high - e.ratio for e in entries]]
    style = {"error_kw": {"elinewidth": 1}, "color": [COLORS[entry.verdict] for entry in entries]}
    axes.barh(places, ratios, xerr=spread, **style)
    axes.plot([entry.bar for entry in entries], places, "|", color="#555555", markersize=11, markeredgewidth=2)
    axes.axvline(1, color="#555555", linestyle="--", linewidth=0.8)
    axes.set_yticks(places, [entry.name for entry in entries], fontsize=8)
    axes.set_xlim(0, max(1.3, *(entry.ratio * 1.1 for entry in entries)))
    axes.set_xlabel("time of isoshard / time of the peer; grey marks: the bar, lines: quartiles", fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Draw the tables that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/bench.svg"), help="picture (%(default)s)")
    options = parser.parse_args()
    entries = [entry for path in options.tables for entry in read(path)]
    if not entries:
        raise SystemExit(f"no rows with a bar in {', '.join(map(str, options.tables))}")
    draw(entries, options.out)
    counts = {verdict: sum(entry.verdict == verdict for entry in entries) for verdict in COLORS}
    print(f"{options.out}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


if __name__ == "__main__":
    main()
