"""A counter that is waited for: parties that go one after the other."""

from __future__ import annotations

from flashsim.engine.causality import Clock, join
from flashsim.engine.simulation import Event, Simulation


class Semaphore:
    """Counts the arrivals of parties that come `each` times; whoever waits goes on when enough parties have come.

    As the counters in global memory by which the CTAs of a kernel take turns (FlashAttention-3's dq_semaphore).
    """

    __slots__ = ("_waiting", "arrived", "clock", "each", "name", "sim")

    def __init__(self, sim: Simulation, name: str, each: int) -> None:
        self.sim = sim
        self.name = name
        self.each = each
        self.arrived = 0
        self.clock: Clock = {}
        self._waiting: list[Event] = []

    def arrive(self, clock: Clock | None = None) -> None:
        """One arrival; those who wait will know all that it knows."""
        self.arrived += 1
        if clock is not None:
            join(self.clock, clock)
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self.sim.fire(event)

    def after(self, parties: int, delay: int = 0) -> SemaphoreWait:
        """Wait until so many parties have arrived as often as each does."""
        return SemaphoreWait(self, parties, delay)


class SemaphoreWait:
    """Waiting for a number of parties."""

    __slots__ = ("delay", "parties", "semaphore")

    def __init__(self, semaphore: Semaphore, parties: int, delay: int) -> None:
        self.semaphore = semaphore
        self.parties = parties
        self.delay = delay

    def ready(self) -> bool:
        return self.semaphore.arrived >= self.parties * self.semaphore.each

    def subscribe(self, event: Event) -> None:
        self.semaphore._waiting.append(event)

    def knowledge(self) -> Clock | None:
        return self.semaphore.clock

    def describe(self) -> str:
        s = self.semaphore
        return f"{self.parties} parties at {s.name} ({s.arrived} of {self.parties * s.each} arrivals)"
