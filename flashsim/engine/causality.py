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
    """One access: operation number `count` of `timeline` touches `rows` of a memory until it ends."""

    timeline: Timeline
    count: int
    rows: tuple[int, int]
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
    aliases: list[Memory] = field(default_factory=list)

    def read(self, access: Access, clock: Clock) -> None:
        """Note a read that begins with knowledge `clock`. Raises Race if a write is not known to have ended."""
        self._collide(self.writes, access, clock, rows=True)
        for alias in self.aliases:
            self._collide(alias.writes, access, clock, rows=False)
        self.reads = [r for r in self.reads if r.timeline is not access.timeline or r.rows != access.rows]
        self.reads.append(access)

    def write(self, access: Access, clock: Clock) -> None:
        """Note a write that begins with knowledge `clock`. Raises Race if any access is not known to have ended."""
        self._collide(self.writes + self.reads, access, clock, rows=True)
        for alias in self.aliases:
            self._collide(alias.writes + alias.reads, access, clock, rows=False)
        self.writes = [w for w in self.writes if not _covers(access.rows, w.rows)] + [access]
        self.reads = [r for r in self.reads if not _covers(access.rows, r.rows)]

    def _collide(self, earlier: list[Access], access: Access, clock: Clock, *, rows: bool) -> None:
        for other in earlier:
            if not other.before(clock) and (not rows or _overlap(other.rows, access.rows)):
                raise Race(f"race on {self.name}: nothing orders {other} before {access}", memory=self)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _covers(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
