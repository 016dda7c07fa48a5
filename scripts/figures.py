"""Draws the pictures of docs/layers.md and docs/same_bits.md: who holds what, and where something is sent.

    python -m scripts.figures --out docs/figures

A colour is a rank, grey is what every rank holds, and a red name is a collective.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44")
SHARED, SENT, LINE = "#d9d9d9", "#cc3311", "#555555"
RANKS = len(COLORS)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw every picture into the folder that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder (%(default)s)")
    out: Path = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    for draw in PICTURES:
        picture = Picture()
        draw(picture)
        picture.save(out / f"{draw.__name__}.svg")


class Picture:
    """Tensors and arrows on a plane whose unit is a quarter of an inch."""

    def __init__(self) -> None:
        import matplotlib
        from matplotlib.figure import Figure

        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["svg.hashsalt"] = "isoshard"
        self.axes: Any = Figure().add_axes((0, 0, 1, 1))
        self.axes.set_aspect("equal")
        self.axes.axis("off")
        self._right = self._top = self._bottom = 0.0

    def box(self, x: float, y: float, width: float, height: float, color: str, label: str = "") -> None:
        """A filled rectangle with its lower left corner at x, y."""
        from matplotlib.patches import Rectangle

        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1))
        if label:
            self.text(x + width / 2, y + height / 2, label, size=8)
        self._reach(x + width, y, y + height)

    def tensor(
        self, x: float, y: float, width: float, height: float, name: str, cut: str = "", pieces: int = RANKS
    ) -> None:
        """A tensor with its ``name`` below: ``cut`` into "columns" or "rows", one per rank, or held by all."""
        if not cut:
            self.box(x, y, width, height, SHARED)
        for i in range(pieces if cut else 0):
            color = COLORS[i * RANKS // pieces]
            if cut == "columns":
                self.box(x + i * width / pieces, y, width / pieces, height, color)
            else:
                self.box(x, y + height - (i + 1) * height / pieces, width, height / pieces, color)
        self.text(x + width / 2, y - 0.6, name)

    def text(self, x: float, y: float, text: str, color: str = "black", size: float = 9, align: str = "center") -> None:
        """A line of text around, or right of, x."""
        self.axes.text(x, y, text, color=color, fontsize=size, ha=align, va="center", family="sans-serif")
        lines = text.split("\n")
        reach = max(map(len, lines)) * size * 0.031
        self._reach(x + (reach if align == "left" else reach / 2), y - 0.4 * len(lines), y + 0.4 * len(lines))

    def arrow(self, x: float, y: float, length: float, above: str = "", below: str = "") -> None:
        """To the right; ``above`` is sent forward, ``below`` backward."""
        style = {"arrowstyle": "-|>", "color": LINE, "linewidth": 1.2}
        self.axes.annotate("", xy=(x + length, y), xytext=(x, y), arrowprops=style)
        for where, sent in ((y + 0.7, above), (y - 0.7, below)):
            self.text(x + length / 2, where, sent, LINE if sent == "nothing" else SENT, 8)

    def line(self, x: float, y: float, x2: float, y2: float, color: str = LINE) -> None:
        self.axes.plot([x, x2], [y, y2], color=color, linewidth=1.2, zorder=0)

    def save(self, path: Path) -> None:
        """As SVG, cut to what was drawn."""
        width, bottom, height = self._right + 0.5, self._bottom - 0.4, self._top - self._bottom + 0.8
        self.axes.set(xlim=(-1, width), ylim=(bottom, bottom + height))
        self.axes.figure.set_size_inches((width + 1) / 4, height / 4)
        self.axes.figure.savefig(path, metadata={"Date": None, "Creator": None})

    def _reach(self, right: float, bottom: float, top: float) -> None:
        self._right, self._bottom, self._top = max(self._right, right), min(self._bottom, bottom), max(self._top, top)


def column(p: Picture) -> None:
    """x W^T with the outputs cut."""
    p.tensor(0, 0, 3, 2.5, "x  [s, in]")
    p.arrow(3.4, 1.25, 3.2, "nothing", "all-reduce of dx")
    p.tensor(7, -0.25, 4, 3, "$W^T$  [in, out]", "columns")
    p.text(12, 1.25, "=")
    p.tensor(13, 0, 4, 2.5, "y  [s, out]", "columns")


def row(p: Picture) -> None:
    """x W^T with the inputs cut."""
    p.tensor(0, 0, 4, 2.5, "x  [s, in]", "columns")
    p.tensor(5, -0.75, 2.5, 4, "$W^T$  [in, out]", "rows")
    p.text(8.5, 1.25, "=")
    for i, color in enumerate(COLORS):
        p.box(9.5 + 0.35 * i, 0.5 - 0.2 * i, 2.5, 2.3, color)
    p.text(11.3, -0.8, "a term per rank")
    p.arrow(13.5, 1.25, 3.2, "all-reduce", "nothing")
    p.tensor(17.1, 0, 2.5, 2.5, "y  [s, out]")


def embedding(p: Picture) -> None:
    """Each rank selects the rows that it holds."""
    for i, token in enumerate(("7", "0", "3", "5")):
        p.box(0, 3 - i, 1, 1, SHARED, token)
    p.text(0.5, -0.6, "ids  [s]")
    p.text(1.9, 2, "→")
    p.tensor(2.6, 0, 2, 4, "table  [v, h]", "rows")
    p.text(5.4, 2, "=")
    for i, color in enumerate(COLORS):
        for position, owner in enumerate((3, 0, 1, 2)):
            p.box(6 + 2.3 * i, 3 - position, 2, 1, color if owner == i else "#f2f2f2", "" if owner == i else "0")
    p.text(10.4, -0.6, "a term per rank  [s, h]")
    p.arrow(15.4, 2, 3.2, "all-reduce", "nothing")
    p.tensor(19, 0, 2, 4, "E  [s, h]")


def attention(p: Picture) -> None:
    """Heads are dealt out; ranks that share a kv head sum its gradient."""
    p.tensor(0, 1, 2, 2.5, "x  [s, h]")
    p.arrow(2.3, 2.25, 3.2, "nothing", "all-reduce of dx")
    for head in range(8):
        p.box(6 + head, 3.2, 1, 1, COLORS[head // 2], f"q{head}")
        p.box(6 + head, 2, 1, 1, COLORS[head // 2], f"k{head // 4}")
        p.box(6 + head, 0.8, 1, 1, COLORS[head // 2], f"v{head // 4}")
    p.text(10, 0.1, "8 heads, 2 kv heads: two ranks hold k0")
    p.text(10, -0.8, "and sum its gradient (all-gather)")
    p.text(14.6, 2.5, "→")
    p.tensor(15.2, 0.75, 2, 3.5, "$W_o^T$", "rows")
    p.arrow(17.6, 2.5, 3, "all-reduce", "nothing")
    p.tensor(21, 1.25, 2, 2.5, "y  [s, h]")


def head_and_loss(p: Picture) -> None:
    """Logits stay cut; two numbers per token and rank are enough for the loss."""
    p.tensor(0, 0, 2, 2.5, "x  [s, h]")
    p.arrow(2.3, 1.25, 3.2, "nothing", "all-reduce of dx")
    p.tensor(5.8, 0, 4, 2.5, "logits  [s, v]", "columns")
    p.text(10.6, 1.25, "→")
    p.tensor(11.3, 0, 1.6, 2.5, "two numbers", "columns")
    p.arrow(13.3, 1.25, 3.4, "all-gather", "nothing")
    p.tensor(17.2, 0.75, 1, 1, "loss")


def norm_groups(p: Picture) -> None:
    """Groups of channels inside a shard, and across two."""
    for y, groups, sent in ((2.6, 8, "nothing is sent"), (0, 2, "one small all-reduce each way")):
        p.tensor(0, y, 8, 1, "", "columns")
        for i in range(groups):
            left, right = 8 / groups * i + 0.15, 8 / groups * (i + 1) - 0.15
            p.line(left, y - 0.25, right, y - 0.25)
        p.text(8.6, y + 0.5, sent, SENT if groups == 2 else "black", align="left")
    p.text(0, -0.9, "channels of x; a line is a group that is normed together", align="left")


def block(p: Picture) -> None:
    """One block: between its collectives every rank holds x, or its part of the sequence."""
    parts = ("norm", "attention", "+", "norm", "feed-forward", "+")
    lanes = [(3.6, "", ("nothing", "all-reduce"), ("all-reduce", "nothing"))]
    lanes += [(0, "rows", ("all-gather", "reduce-scatter"), ("reduce-scatter", "all-gather"))]
    for y, cut, enter, leave in lanes:
        x = 0.0
        for part in parts:
            if part in ("norm", "+"):
                p.tensor(x, y, 1.6, 1.6, part, cut)
                x += 2.0
            else:
                p.arrow(x, y + 0.8, 3.6, *enter)
                p.tensor(x + 4, y, 3, 1.6, part, "columns")
                p.arrow(x + 7.3, y + 0.8, 3.6, *leave)
                x += 11.3
    p.text(0, 6.1, "above an arrow: sent forward; below: sent backward", align="left")
    p.text(0, 2.2, "with sequence_parallel=True", align="left")


def tree(p: Picture) -> None:
    """Eight logical shards summed by one tree, on two ranks and on four."""
    for x0, ranks in ((0.0, 2), (11.0, 4)):
        xs = [x0 + 1.2 * i for i in range(8)]
        for i, x in enumerate(xs):
            p.box(x, 0, 1, 1, COLORS[i * ranks // 8], str(i))
        centres, y = [x + 0.5 for x in xs], 1.0
        for level in range(3):
            sent = 8 // ranks <= 2**level
            pairs = [(centres[i], centres[i + 1]) for i in range(0, len(centres), 2)]
            for a, b in pairs:
                for c in (a, b):
                    p.line(c, y, (a + b) / 2, y + 1.2, SENT if sent else LINE)
            centres, y = [(a + b) / 2 for a, b in pairs], y + 1.2
        p.text(x0 + 4.7, y + 0.5, f"{ranks} ranks")
    p.text(10, -0.7, "8 logical shards, summed in the same pairs; red lines cross ranks")


PICTURES: tuple[Callable[[Picture], None], ...] = (
    column,
    row,
    embedding,
    attention,
    head_and_loss,
    norm_groups,
    block,
    tree,
)

if __name__ == "__main__":
    main()
