"""Times of microbenchmarks, and what follows from them: medians, lines, and whether two instructions share a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Final, NamedTuple

SPREAD: Final = 0.05
"""Distance between the quartiles, as a part of the median, above which a measurement is refused."""
MISS: Final = 0.03
"""By which a line may miss a point."""
SHARED, SEPARATE = 0.2, 0.8
"""Overlap up to which two kinds of instruction share a pipe, and from which they do not."""
OVERLAP_ERROR: Final = 0.1
"""Of an overlap, by the spreads of the three times; with more, nothing is said."""


class Reading(NamedTuple):
    """Time of one launch, from the first warp's start to the last one's end."""

    clk: float
    ns: float


@dataclass(frozen=True)
class Timing:
    """One microbenchmark: launches of n turns and of 2 n turns, alternating."""

    turns: int
    """n."""
    units: float
    """What a turn has: instructions a thread, steps of a chain, bytes."""
    short: Sequence[Reading]
    long: Sequence[Reading]

    def clk(self) -> Estimate:
        """Of one unit."""
        return self._of_one([b.clk - a.clk for a, b in zip(self.short, self.long, strict=True)])

    def ns(self) -> Estimate:
        """Of one unit."""
        return self._of_one([b.ns - a.ns for a, b in zip(self.short, self.long, strict=True)])

    def _of_one(self, differences: Sequence[float]) -> Estimate:
        return Estimate.of([d / self.turns / self.units for d in differences])


@dataclass(frozen=True)
class Estimate:
    """A median, and the distance between the quartiles as a part of it."""

    value: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Raises Refused if there are fewer than four, or the median is not positive."""
        if len(values) < 4:
            raise Refused(f"{len(values)} measurements are too few")
        middle, (low, _, high) = median(values), quantiles(values, n=4)
        if middle <= 0:
            raise Refused("a longer run was not measurably longer")
        return cls(middle, (high - low) / middle, len(values))

    def times(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.spread, self.count)

    def rate(self, work: float = 1.0) -> Estimate:
        """Work over this time. Raises Refused if it is 0."""
        if not self.value:
            raise Refused("it takes no time")
        return Estimate(work / self.value, self.spread, self.count)


class Refused(Exception):
    """Why a number is not measured."""


@dataclass(frozen=True)
class Raw:
    """What was measured on one GPU."""

    timings: Mapping[str, Timing]
    """By the names that `mix_name` and the sections below have for them."""
    gaps_ns: Sequence[float] = ()
    """From the end of a kernel to the start of the next in a stream that has a backlog; means over many kernels."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Why microbenchmarks did not run."""

    def timing(self, name: str) -> Timing:
        """Raises Refused if it did not run."""
        if name not in self.timings:
            raise Refused(f"{name}: {self.failed.get(name, 'not run')}")
        return self.timings[name]

    def clk(self, name: str) -> Estimate:
        return steady(name, self.timing(name).clk())

    def ns(self, name: str) -> Estimate:
        return steady(name, self.timing(name).ns())

    def clock_mhz(self) -> float | None:
        """The SM clock while measuring: cycles over ns, of all launches together; None if none counted both."""
        both = [r for timing in self.timings.values() for r in (*timing.short, *timing.long) if r.clk > 0 and r.ns > 0]
        return 1000 * sum(r.clk for r in both) / sum(r.ns for r in both) if both else None


def steady(name: str, estimate: Estimate) -> Estimate:
    """The estimate. Raises Refused if its spread is above SPREAD."""
    if estimate.spread > SPREAD:
        raise Refused(f"{name}: spread {estimate.spread:.1%}, above {SPREAD:.0%}")
    return estimate


@dataclass(frozen=True)
class Overlap:
    """How two kinds of instruction go together."""

    mix: Mapping[str, int]
    alone_clk: tuple[float, float]
    """Of the two parts of a round, by itself each."""
    together_clk: float
    error: float

    @property
    def share(self) -> float:
        """0: one after the other; 1: side by side."""
        return (sum(self.alone_clk) - self.together_clk) / min(self.alone_clk)

    @property
    def balance(self) -> float:
        return min(self.alone_clk) / max(self.alone_clk)

    @property
    def verdict(self) -> str:
        if self.error > OVERLAP_ERROR or not -SHARED <= self.share <= 1 + SHARED:
            return "undecided"
        return "shared" if self.share <= SHARED else "separate" if self.share >= SEPARATE else "undecided"


def mix_name(mix: Mapping[str, int]) -> str:
    """`exp + 4 pack`."""
    return " + ".join(kind if count == 1 else f"{count} {kind}" for kind, count in mix.items())


def line(points: Mapping[float, Estimate]) -> tuple[Estimate, Estimate]:
    """Constant and slope by least squares, neither of them negative.

    Raises Refused if a point is missed by more than MISS.
    """
    x, y = list(points), [e.value for e in points.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    constant = mean_y - slope * mean_x
    if constant < 0:
        constant, slope = 0.0, sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
    elif slope < 0:
        constant, slope = mean_y, 0.0
    for a, b in zip(x, y, strict=True):
        miss = abs(constant + slope * a - b) / b
        if miss > MISS:
            raise Refused(f"no line: {constant:.4g} + {slope:.4g} x misses {b:.4g} at x = {a:g} by {miss:.1%}")
    spread, count = max(e.spread for e in points.values()), min(e.count for e in points.values())
    return Estimate(constant, spread, count), Estimate(slope, spread, count)


def overlap(raw: Raw, mix: Mapping[str, int]) -> Overlap:
    """Raises Refused if one of the three did not run."""
    (a, count_a), (b, count_b) = mix.items()
    first, second, both = raw.clk(a).times(count_a), raw.clk(b).times(count_b), raw.clk(mix_name(mix))
    spread = max(first.spread, second.spread, both.spread)
    alone = (first.value, second.value)
    return Overlap(mix, alone, both.value, spread * sum(alone) / min(alone))


def balanced(overlaps: Iterable[Overlap], a: str, b: str) -> Overlap | None:
    """Of the mixes of two kinds, the one whose parts take the most similar times."""
    found = [one for one in overlaps if set(one.mix) == {a, b}]
    return max(found, key=lambda one: one.balance) if found else None
