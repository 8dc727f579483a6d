"""How long work tiles take on an SM with its memory for itself, learnt from a few probes.

A KV loop is periodic: after a few KV tiles, every warpgroup starts its next ones at the same distances as before, to the
tick. So a long work tile is probed at a shorter length, and whole periods are added. The schedule itself sees a shorter
problem, whatever kind of loop it is written with; none of its variables is inspected.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from statistics import fmean

from flashsim.machine.probe import Probe, TileClass
from flashsim.units import ticks

LENGTHS = (24, 48, 96)
"""Lengths at which a loop is tried, one after the other, until a period shows."""
LONGEST_PERIOD = 12
"""KV tiles. Three warpgroups that share the exp pipe have been seen to come round after seven."""
MARGIN = 4
"""KV tiles by which a producer can be ahead of the loop whose period is looked at, and more."""
WINDOW = 2
"""How many work tiles before a tile can still be felt in its time."""
ROUNDS = 3
"""CTAs on each slot of a probe of several CTAs, of which the first round is the start."""
SHORT = TileClass(6, 0, False, False)
SHORT_PARTIAL = TileClass(6, 2, False, False)
PHASES_CLK = (0, 300, 700, 1500)
"""Distances between the starts of CTAs that share an SM, over which their times are averaged."""


class Pace:
    """Times of work tiles, by their class and what came before. Ticks."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self._base: dict[TileClass, tuple[int, int, int]] = {}
        self._shares: dict[int, tuple[float, float, float, float]] = {}
        self._steps: dict[tuple[TileClass, ...], tuple[int, int]] = {}

    def fold(self, tile: TileClass) -> tuple[TileClass, int, int]:
        """(a short tile of the same kind, ticks that `tile` takes longer, KV tiles that it is longer)."""
        kind = tile._replace(count=0)
        if kind not in self._base:
            self._base[kind] = self._steady(tile)
        length, period, duration = self._base[kind]
        periods = max(0, (tile.count - length) // period)
        return tile._replace(count=tile.count - periods * period), periods * duration, periods * period

    def _steady(self, tile: TileClass) -> tuple[int, int, int]:
        """(length from which a loop of this kind is periodic, KV tiles of a period, ticks of a period).

        A loop without a period that shows is never shortened.
        """
        for length in LENGTHS:
            walks = self.probe.run([tile._replace(count=length + tile.partial)]).walks
            gaps = [[b - a for a, b in pairwise(walk)] for walk in walks]
            for period in range(1, LONGEST_PERIOD + 1):
                starts = [_periodic_from(gap, period) for gap in gaps]
                if max(starts) + 2 * period <= min(len(gap) for gap in gaps):
                    return max(starts) + MARGIN + period, period, sum(gaps[0][-period:])
        return sys.maxsize, 1, 0

    # One CTA at a time, which takes tile after tile.

    def step(self, before: tuple[TileClass, ...], tile: TileClass) -> int:
        """From when `tile` is asked for to when the next one is, after the tiles `before`."""
        return self._step(before, tile)[0]

    def tail(self, before: tuple[TileClass, ...], tile: TileClass) -> int:
        """From when no tile is left after `tile` to the end of the CTA."""
        return self._step(before, tile)[1]

    def _step(self, before: tuple[TileClass, ...], tile: TileClass) -> tuple[int, int]:
        folded = [self.fold(t) for t in (*before[-WINDOW:], tile)]
        short = tuple(f[0] for f in folded)
        if short not in self._steps:
            trace = self.probe.run(short)
            self._steps[short] = (trace.asks[-1] - trace.asks[-2], trace.end - trace.asks[-1])
        step, tail = self._steps[short]
        return step + folded[-1][1], tail

    # Several CTAs at a time, each with one tile.

    def share(self, tile: TileClass, resident: int, first: bool) -> int:
        """Time of a CTA with `tile` while `resident` such CTAs share the SM; the `first` ones start together.

        A sum of a time for the CTA, one for each KV tile, and one more for each partial tile. CTAs that share units stay
        in the phase in which they met, which the hardware does not fix, so the times are means over several.
        """
        if resident not in self._shares:
            self._shares[resident] = self._measure_share(resident)
        first_cta, cta, kv_tile, partial = self._shares[resident]
        return round((first_cta if first else cta) + kv_tile * tile.count + partial * tile.partial)

    def _measure_share(self, resident: int) -> tuple[float, float, float, float]:
        """Ticks of a CTA that starts with the others, of one that follows another, of a KV tile, more if partial."""
        phases = PHASES_CLK if resident > 1 else (0,)
        loop = fmean(self._loop_of(resident, ticks(phase)) for phase in phases)
        first = fmean(self.probe.run([SHORT] * resident, resident, offset=ticks(p)).end - ticks(p) for p in phases)
        one, some = (fmean(self._round(tile, resident, ticks(p)) for p in phases) for tile in (SHORT, SHORT_PARTIAL))
        loops = loop * SHORT.count
        return first - loops, one - loops, loop, (some - one) / SHORT_PARTIAL.partial

    def _loop_of(self, resident: int, offset: int) -> float:
        """Ticks of one KV tile of each of `resident` CTAs that run side by side."""
        tile = SHORT._replace(count=LENGTHS[0])
        walks = self.probe.run([tile] * resident, resident, offset=offset).walks
        # The last CTAs' last KV tiles are alone on the SM, the first ones' first too.
        last, first = LENGTHS[0] - 2, LENGTHS[0] // 3
        return fmean((walk[last] - walk[first]) / (last - first) for walk in walks)

    def _round(self, tile: TileClass, resident: int, offset: int) -> float:
        """Ticks of a round of CTAs, each of which follows another."""
        one, all_rounds = (self.probe.run([tile] * (resident * r), resident, offset=offset).end for r in (1, ROUNDS))
        return (all_rounds - one) / (ROUNDS - 1)

    def first_ask(self) -> int:
        """From the start of a CTA to its first question for a tile."""
        return self.probe.run([TileClass(1, 0, False, False)]).asks[0]

    def busy(self, tile: TileClass) -> dict[str, int]:
        """Ticks of work for each unit in `tile`."""
        short, _, more = self.fold(tile)
        base = self.probe.run([short]).busy
        if not more:
            return base
        longer = self.probe.run([short._replace(count=short.count + 1)]).busy
        return {unit: base[unit] + (longer[unit] - base[unit]) * more for unit in base}

    def loop(self, tile: TileClass, extra: int = 0) -> float:
        """Ticks of one KV tile in a long loop, with K and V `extra` ticks late."""
        walks = self.probe.run([tile._replace(count=LENGTHS[0] + tile.partial)], 1, (extra, 0)).walks
        walk = max(walks, key=lambda starts: starts[-1])
        return (walk[-1] - walk[-1 - LENGTHS[0] // 2]) / (LENGTHS[0] // 2)

    def patience(self, tile: TileClass, late: int) -> int:
        """By how many ticks a CTA's next work tile can have its Q late without being late itself, up to `late`."""
        short = self.fold(tile)[0]
        on_time, waited = (self.probe.run([short] * 3, 1, (0, extra)).asks for extra in (0, late))
        return max(0, late - (waited[-1] - waited[-2]) + (on_time[-1] - on_time[-2]))


def _periodic_from(gaps: list[int], period: int) -> int:
    """The index from which `gaps` repeat themselves after `period`."""
    start = len(gaps) - period
    while start > 0 and gaps[start - 1] == gaps[start - 1 + period]:
        start -= 1
    return start
