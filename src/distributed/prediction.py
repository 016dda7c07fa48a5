"""How long collectives would take: an estimate by the alpha-beta model, a range instead of a number.

A message of S bytes takes alpha + S beta seconds (Hockney 1994, "The communication challenge for MPP"). Algorithms and
their costs: Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FORMULA = """\
An estimate by the alpha-beta model, not a measurement. Per collective of S bytes on n ranks, in seconds:
  high  a ring through the slowest link in use:   C (n - 1) (alpha + (S / n) beta)
  low   a tree per level of links, one level after the other, the sum over levels of
        k ranks each:                             ceil(log2 k) alpha + c ((k - 1) / k) S' beta
        where S' is S divided by the number of ranks that the levels inside join
  c, C  all_reduce 2, 2; all_gather, reduce_scatter 1, 1; broadcast 1, 2; barrier 2, 2 with S = 0
An all_reduce that gathered all terms in the record may take (n - 1) (alpha + S beta): high is the larger one.
S is what all ranks hold together, taken to be the same at every n. Nothing but communication is counted: computation
may hide part of it, in high it hides nothing. Contention, late ranks and launches come on top; switches that add
(NVLink SHARP) can be faster than low."""

# c and C of FORMULA.
_FACTORS = {
    "all_reduce": (2, 2),
    "all_gather": (1, 1),
    "reduce_scatter": (1, 1),
    "broadcast": (1, 2),
    "barrier": (2, 2),
}


@dataclass(frozen=True)
class Link:
    """One level of a machine: ``alpha`` seconds per message, ``beta`` seconds per byte that a rank sends.

    It joins ``ranks`` ranks, those of all levels inside it included; None joins any number.

    Raises ValueError for negative costs and for fewer than two ranks.
    """

    alpha: float
    beta: float
    ranks: int | None = None

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0:
            raise ValueError(f"alpha={self.alpha} and beta={self.beta} must not be negative")
        if self.ranks is not None and self.ranks < 2:
            raise ValueError(f"ranks={self.ranks}: a link joins at least 2")

    @classmethod
    def of(cls, *, microseconds: float, gigabytes_per_second: float, ranks: int | None = None) -> Link:
        """From the latency of a message in microseconds and the rate of one rank, one way, in 10^9 bytes per second.

        Raises ValueError for a rate that is not positive.
        """
        if gigabytes_per_second <= 0:
            raise ValueError(f"gigabytes_per_second={gigabytes_per_second} must be positive")
        return cls(microseconds * 1e-6, 1e-9 / gigabytes_per_second, ranks)


@dataclass(frozen=True)
class Transfer:
    """One collective: ``size`` bytes that all ranks hold together, or that each of them holds for a reduction.

    ``gathers`` marks an all-reduce that gathers all terms on every rank.
    """

    op: str
    size: int
    gathers: bool = False


@dataclass(frozen=True)
class Estimate:
    """Seconds of communication in a group of ``world_size``, ``low`` to ``high``: an estimate, not a measurement."""

    world_size: int
    low: float
    high: float

    @property
    def interval(self) -> str:
        """``8 GPUs: 2.10 ms to 2.46 ms``."""
        return f"{self.world_size} GPUs: {human_seconds(self.low)} to {human_seconds(self.high)}"

    def __str__(self) -> str:
        return f"{self.interval} of communication (estimate)\n{FORMULA}"


def estimate(transfers: Iterable[Transfer], links: Sequence[Link], world_size: int) -> Estimate:
    """One transfer after the other in a group of ``world_size`` ranks that fills ``links`` from the inside out.

    The formula is ``FORMULA``. Raises ValueError for a ``world_size`` below 1, for links that do not join that many
    ranks or do not contain each other evenly, and for operations other than those of the ledger.
    """
    levels = _levels(links, world_size)
    low = high = 0.0
    for transfer in transfers:
        if transfer.op not in _FACTORS:
            raise ValueError(f"op={transfer.op!r} is none of {', '.join(_FACTORS)}")
        low += _hierarchical(transfer, levels)
        high += _ring(transfer, levels, world_size)
    return Estimate(world_size, low, high)


def human_seconds(seconds: float) -> str:
    """``seconds`` in s, ms or µs."""
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms")) if seconds >= s), (1e-6, "µs"))
    return f"{seconds / scale:,.2f} {unit}"


def _levels(links: Sequence[Link], world_size: int) -> list[tuple[int, Link]]:
    """How many parts each link joins, from the inside out, as far as ``world_size`` ranks reach."""
    if world_size < 1:
        raise ValueError(f"world_size={world_size} must be at least 1")
    levels, joined = [], 1
    for link in links:
        reach = world_size if link.ranks is None else min(link.ranks, world_size)
        if joined == world_size:
            break
        if world_size % reach:
            raise ValueError(f"world_size={world_size} is not a multiple of the ranks={reach} that a link joins")
        if reach % joined or reach == joined:
            raise ValueError(
                f"a link of ranks={reach} cannot join whole links of ranks={joined}; order them inside out"
            )
        levels.append((reach // joined, link))
        joined = reach
    if joined < world_size:
        raise ValueError(f"the links join {joined} ranks, not world_size={world_size}; add one with ranks=None")
    return levels


def _hierarchical(transfer: Transfer, levels: Sequence[tuple[int, Link]]) -> float:
    factor, size, seconds = _FACTORS[transfer.op][0], float(transfer.size), 0.0
    for parts, link in levels:
        seconds += (parts - 1).bit_length() * link.alpha + factor * (parts - 1) / parts * size * link.beta
        size /= parts
    return seconds


def _ring(transfer: Transfer, levels: Sequence[tuple[int, Link]], world_size: int) -> float:
    alpha = max((link.alpha for _, link in levels), default=0.0)
    beta = max((link.beta for _, link in levels), default=0.0)
    seconds = (world_size - 1) * _FACTORS[transfer.op][1] * (alpha + transfer.size / world_size * beta)
    gathered = (world_size - 1) * (alpha + transfer.size * beta) if transfer.gathers else 0.0
    return max(seconds, gathered)
