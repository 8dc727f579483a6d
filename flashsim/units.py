"""Time is an integer number of ticks, 256 to a clock cycle, so that sums are exact and results identical everywhere.

A rate or a latency becomes ticks once, when the machine is built, and only through `ticks`.
"""

from __future__ import annotations

import math

TICKS_PER_CLK = 256


def ticks(clk: float) -> int:
    """Nearest whole number of ticks for `clk` cycles; ties go up. This is the only rounding of time in flashsim.

    Raises ValueError if `clk` is negative or not finite.
    """
    if not math.isfinite(clk) or clk < 0:
        raise ValueError(f"a duration must be finite and not negative, got {clk} clk")
    return math.floor(clk * TICKS_PER_CLK + 0.5)


def cycle_of(time: int) -> str:
    """The cycle of a point in time, for messages."""
    return f"cycle {time / TICKS_PER_CLK:.0f}"


def clk_of_ns(ns: float, clock_mhz: float) -> float:
    """Cycles of a `clock_mhz` clock in `ns` nanoseconds."""
    return ns * clock_mhz / 1000


def us_of_ticks(duration: int, clock_mhz: float) -> float:
    """Microseconds that `duration` ticks take at `clock_mhz`."""
    return duration / TICKS_PER_CLK / clock_mhz


class Rate:
    """Ticks for a whole number of units (bytes, say), at a rate that is rounded once, to 2**-20 ticks a unit."""

    __slots__ = ("_scaled",)

    def __init__(self, clk_per_unit: float) -> None:
        self._scaled = math.floor(clk_per_unit * TICKS_PER_CLK * (1 << 20) + 0.5)

    def __call__(self, units: int) -> int:
        return (units * self._scaled + (1 << 19)) >> 20
