"""Contenders side by side: rounds in turns, the ratio round by round, and one row against its bar."""

from collections.abc import Callable, Iterator, Sequence
from statistics import median, quantiles

WIDTH = 36


def rounds(contenders: Sequence[Callable[[], float]], count: int) -> Iterator[tuple[float, ...]]:
    """What the contenders return in each of ``count`` rounds, after one that does not count, in changing order."""
    for turn in range(count + 1):
        found = [0.0] * len(contenders)
        order = range(len(contenders))
        for which in order if turn % 2 else reversed(order):
            found[which] = contenders[which]()
        if turn:
            yield tuple(found)


def verdict(low: float, high: float, bar: float) -> str:
    """Where the quartiles lie: "met" or "missed" where both are on one side of the bar, else "tie"."""
    return "met" if high <= bar else "missed" if low > bar else "tie"


def header(unit: str = "ms") -> str:
    """The line above the rows."""
    return f"{'row':{WIDTH}} {f'ours {unit}':>9} {f'peer {unit}':>9} {'ratio':>6}  quartiles       bar"


def row(name: str, results: Sequence[tuple[float, ...]], bar: float | None = None) -> str:
    """Medians of (ours, peer) and of each round's ratio, with quartiles, and the verdict where there is a bar."""
    ratios = [ours / peer for ours, peer in results]
    low, _, high = quantiles(ratios, n=4)
    ours, peer = (median(column) for column in zip(*results, strict=True))
    numbers = f"{ours:9.3f} {peer:9.3f} {median(ratios):6.2f}  {low:.2f} .. {high:.2f}"
    end = "" if bar is None else f"  {bar:5.2f}  {verdict(low, high, bar)}"
    return f"{name:{WIDTH}} {numbers}{end}"
