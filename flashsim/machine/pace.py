"""How long work tiles take on an SM with its memory for itself, learnt from a few probes.

A KV loop is periodic: from some length on, two more KV tiles always take the same time, to the tick. So a long work tile
is probed at a short length with the same remainder, and whole periods are added. The schedule itself sees a shorter
problem, whatever kind of loop it is written with; none of its variables is inspected.
"""

from __future__ import annotations

from flashsim.machine.probe import Probe, TileClass

PERIOD = 2
"""KV tiles of one period: the warpgroups' turns and the two slots of the usual rings come round after two."""
FIRST_LENGTH = 8
LONGEST = 64
"""Lengths between which a loop is tried for its period."""
WINDOW = 2
"""How many work tiles before a tile can still be felt in its time."""
ROUNDS = 3
"""CTAs on each slot of a probe of several CTAs, of which the first round is the start."""


class Pace:
    """Times of work tiles, by their class and what came before. Ticks."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self._base: dict[TileClass, tuple[int, int]] = {}
        self._steps: dict[tuple[TileClass, ...], tuple[int, int]] = {}

    def fold(self, tile: TileClass) -> tuple[TileClass, int, int]:
        """(a short tile of the same kind, ticks that `tile` takes longer, periods that it is longer)."""
        kind = tile._replace(count=0)
        if tile.count <= FIRST_LENGTH + PERIOD + tile.partial:
            return tile, 0, 0
        if kind not in self._base:
            self._base[kind] = self._steady(tile)
        length, period = self._base[kind]
        periods = max(0, (tile.count - length) // PERIOD)
        return tile._replace(count=tile.count - periods * PERIOD), periods * period, periods

    def _steady(self, tile: TileClass) -> tuple[int, int]:
        """(length from which the loop is periodic, ticks of a period)."""
        length = FIRST_LENGTH + tile.partial
        while True:
            ends = [self.probe.run([tile._replace(count=length + i)]).end for i in (0, 1, 2, 3, 4, 5)]
            periods = [ends[i + PERIOD] - ends[i] for i in range(4)]
            if len(set(periods)) == 1 or length >= min(LONGEST, tile.count):
                return length, periods[-1]
            length += FIRST_LENGTH

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

    def share(self, tile: TileClass, resident: int) -> int:
        """Time of a CTA with `tile` while `resident` such CTAs share the SM, once they have settled."""
        short, longer, periods = self.fold(tile)
        if resident > 1 and periods:
            a, b = (self._round(short._replace(count=short.count + PERIOD * i), resident) for i in (0, 1))
            return a + (b - a) * periods
        return self._round(short, resident) + longer

    def _round(self, tile: TileClass, resident: int) -> int:
        one, all_rounds = (self.probe.run([tile] * (resident * rounds), resident).end for rounds in (1, ROUNDS))
        return (all_rounds - one) // (ROUNDS - 1)

    def first_ask(self) -> int:
        """From the start of a CTA to its first question for a tile."""
        return self.probe.run([TileClass(1, 0, False, False)]).asks[0]

    def busy(self, tile: TileClass) -> dict[str, int]:
        """Ticks of work for each unit in `tile`."""
        short, _, periods = self.fold(tile)
        base = self.probe.run([short]).busy
        if not periods:
            return base
        more = self.probe.run([short._replace(count=short.count + PERIOD)]).busy
        return {unit: base[unit] + (more[unit] - base[unit]) * periods for unit in base}

    def loop(self, tile: TileClass, extra: int = 0) -> float:
        """Ticks of one KV tile in a long loop, with K and V `extra` ticks late."""
        length = FIRST_LENGTH + tile.partial
        short, long = (self.probe.run([tile._replace(count=length + more)], 1, extra).end for more in (0, 8))
        return (long - short) / 8
