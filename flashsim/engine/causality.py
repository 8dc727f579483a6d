"""Happens-before: vector clocks, and who touched which memory.

Every party of a run (a warpgroup, or a queue of asynchronous operations) is a `Timeline`. A clock says how far of every
timeline is known to lie in the past; signals and waits hand clocks on. Two accesses to one memory of which one is a
write are a race unless the earlier one lies in the clock of the later one, *whatever the simulated times were*: that
units happened to serve two operations in order orders nothing (Lamport 1978; Flanagan and Freund, FastTrack, PLDI
2009).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flashsim.errors import Race
from flashsim.units import cycle_of

Clock = dict["Timeline", int]
"""For each timeline, how many of its operations are known to have ended."""
Part = tuple[tuple[int, int], ...]
"""Which part of a memory: along each of its axes, from where to where."""


def join(into: Clock, other: Clock) -> None:
    """`into` comes to know all that `other` knows."""
    for timeline, count in other.items():
        if into.get(timeline, 0) < count:
            into[timeline] = count


class Timeline:
    """One party: its operations are ordered among themselves."""

    __slots__ = ("clock", "count", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.clock: Clock = {}

    def step(self) -> int:
        """Number of the next operation of this timeline, which its own clock then knows."""
        self.count += 1
        self.clock[self] = self.count
        return self.count


@dataclass(frozen=True, slots=True)
class Access:
    """One access: operation number `count` of `timeline` touches a part of a memory until it ends."""

    timeline: Timeline
    count: int
    part: Part
    what: str
    time: int

    def before(self, clock: Clock) -> bool:
        """True if this access is known to `clock` to have ended."""
        return clock.get(self.timeline, 0) >= self.count

    def __str__(self) -> str:
        return f"{self.what} by {self.timeline.name}, issued in {cycle_of(self.time)}"


@dataclass(slots=True)
class Memory:
    """The accesses to one piece of memory that a later one could collide with.

    `aliases` are other pieces at the same addresses: an access to one collides with every access to the other.
    """

    name: str
    writes: list[Access] = field(default_factory=list)
    reads: list[Access] = field(default_factory=list)
    adds: list[Access] = field(default_factory=list)
    aliases: list[Memory] = field(default_factory=list)
    order_matters: bool = False
    """Something has been added in an order that depends on time: the sum does not, its rounding does."""

    def read(self, access: Access, clock: Clock) -> None:
        """Note a read that begins with knowledge `clock`. Raises Race if a write is not known to have ended."""
        self._collide(self.writes + self.adds, access, clock)
        for alias in self.aliases:
            self._collide(alias.writes + alias.adds, access, clock, anywhere=True)
        self.reads = [r for r in self.reads if r.timeline is not access.timeline or r.part != access.part]
        self.reads.append(access)

    def write(self, access: Access, clock: Clock) -> None:
        """Note a write that begins with knowledge `clock`. Raises Race if any access is not known to have ended."""
        self._collide(self.writes + self.adds + self.reads, access, clock)
        for alias in self.aliases:
            self._collide(alias.writes + alias.adds + alias.reads, access, clock, anywhere=True)
        self.writes = [w for w in self.writes if not _covers(access.part, w.part)] + [access]
        self.adds = [a for a in self.adds if not _covers(access.part, a.part)]
        self.reads = [r for r in self.reads if not _covers(access.part, r.part)]

    def add(self, access: Access, clock: Clock) -> None:
        """Note an atomic addition that begins with knowledge `clock`: no two of them collide.

        Raises Race if a read or a write is not known to have ended.
        """
        self._collide(self.writes + self.reads, access, clock)
        unordered = (a for a in self.adds if not a.before(clock) and _overlap(a.part, access.part))
        self.order_matters = self.order_matters or any(unordered)
        known = [a for a in self.adds if a.before(clock) and _covers(access.part, a.part)]
        self.adds = [a for a in self.adds if a not in known] + [access]

    def _collide(self, earlier: list[Access], access: Access, clock: Clock, *, anywhere: bool = False) -> None:
        for other in earlier:
            if not other.before(clock) and (anywhere or _overlap(other.part, access.part)):
                raise Race(f"race on {self.name}: nothing orders {other} before {access}", memory=self)


def _overlap(a: Part, b: Part) -> bool:
    return all(x[0] < y[1] and y[0] < x[1] for x, y in zip(a, b, strict=True))


def _covers(outer: Part, inner: Part) -> bool:
    return all(x[0] <= y[0] and y[1] <= x[1] for x, y in zip(outer, inner, strict=True))
