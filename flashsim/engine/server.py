"""A unit that serves in order of arrival, at one event per operation."""

from __future__ import annotations

from flashsim.engine.simulation import Simulation


class Server:
    """Serves one operation at a time, first come, first served.

    Timing assumption: the duration of an operation is known when it arrives, so its end follows from when the unit
    becomes free, and no queue has to be kept: `start = max(now, free)`.
    """

    __slots__ = ("busy", "free", "name", "sim")

    def __init__(self, sim: Simulation, name: str) -> None:
        self.sim = sim
        self.name = name
        self.free = 0
        """Tick at which everything accepted so far will have been served."""
        self.busy = 0
        """Ticks of service accepted so far."""

    def busy_until(self, time: int) -> int:
        """Ticks of service up to `time`, after which nothing may have arrived."""
        return self.busy - max(0, self.free - time)

    def serve(self, duration: int) -> int:
        """Accept an operation of `duration` ticks now; returns the tick at which it ends."""
        return self.serve_from(self.sim.now, duration)

    def serve_from(self, arrival: int, duration: int) -> int:
        """As `serve`, for an operation known to arrive at tick `arrival`, now or later.

        Timing assumption: nobody else arrives before `arrival` and is accepted after this call; used for chains of
        units behind each other, where it shifts the order of two requests by at most the latency between the units.
        """
        start = self.free if self.free > arrival else arrival
        self.free = end = start + duration
        self.busy += duration
        return end
