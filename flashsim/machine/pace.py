"""How long work tiles take on an SM with its memory for itself, learnt from a few probes, and when they need what.

A KV loop is periodic: after a few KV tiles, every warpgroup starts its next ones at the same distances as before, to
the tick. So a long work tile is probed at a shorter length, and whole periods are added. The schedule itself sees a
shorter problem, whatever kind of loop it is written with; none of its variables is inspected.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from flashsim.machine.probe import Late, Probe, TileClass, What
from flashsim.machine.tiles import HbmTile

LENGTHS = (24, 48, 96)
"""Lengths at which a loop is tried, one after the other, until a period shows."""
LONGEST_PERIOD = 12
"""KV tiles. Three warpgroups that share the exp pipe have been seen to come round after seven."""
MARGIN = 4
"""KV tiles by which a producer can be ahead of the loop whose period is looked at, and more."""
WINDOW = 2
"""How many work tiles before a tile can still be felt in its time."""
STEADY, SAMPLE = 6, 11
"""From which KV tile of a work tile on all are needed as long after they are asked for; KV tiles of the work tiles that
are probed for that."""
STEADY_WITHOUT_RINGS, SAMPLE_WITHOUT_RINGS = 2, 6
"""The same where loads run ahead by one tile at most (cp.async)."""
STEADY_IN_A_HEAD, SAMPLE_OF_A_HEAD = 0, 4
"""The same where a CTA has a whole head for itself: thousands of short steps, whose data nobody else asks for."""
A_LITTLE = 64
"""Part of a probe's time by which something is let come a little late."""
LONG_SAMPLE = 32
"""Steps of such a CTA that are tried beside those of others on its SM."""
TURNS = 4
"""CTAs that follow each other where CTAs share an SM."""
SPREADS = 2
"""Times that this is tried."""


class Piece(NamedTuple):
    """Some KV tiles' part of a tensor, taken together, or all that a work tile has of it."""

    item: int
    """The first of these KV tiles in the order in which they are visited."""
    items: int
    size_byte: int


class Mark(NamedTuple):
    """A point in the course of a work tile: something moves, or is needed. Ticks from when the tile was asked for, on
    an SM that never waits for late data."""

    time: int
    """When it moves; or when something moves that has to wait if it is late."""
    due: int
    """When it has to be there."""
    what: What
    needed: bool
    piece: Piece
    number: int
    """The same for the two marks of one thing."""

    def times(self, n: int) -> Mark:
        """`n` such things that follow each other, as if they were one."""
        piece = self.piece._replace(size_byte=self.piece.size_byte * n)
        return self._replace(time=self.time * n, due=self.due * n, piece=piece)


class Course(NamedTuple):
    """What a work tile does and when, after certain others and with nothing late. Ticks from when it is asked for."""

    marks: tuple[Mark, ...]
    step: int
    """When the next one is asked for."""
    end: int
    """When the CTA ends if there is no next one."""

    def times(self, n: int) -> Course:
        """Of `n` such work tiles that follow each other, as if they were one."""
        return Course(tuple(mark.times(n) for mark in self.marks), self.step * n, self.end * n)


class Pace:
    """Times of work tiles, by their class and what came before."""

    def __init__(self, probe: Probe, chunk: int = 1, together: int = 1, spread: bool = True) -> None:
        """`chunk` KV tiles are taken together, and `together` work tiles; `spread`: the memory's latency varies."""
        self._seeds: tuple[int | None, ...] = tuple(range(SPREADS)) if spread else (None,)
        self.together = together
        self.probe = probe
        self.chunk = chunk
        self._one_each = probe.kernel.grid.launch == "cta"
        self._base: dict[TileClass, tuple[int, int, int]] = {}
        self._folds: dict[TileClass, tuple[TileClass, int, int]] = {}
        self._courses: dict[tuple[tuple[TileClass, ...], TileClass, int], Course] = {}
        self._parts: dict[tuple[str, TileClass, int], list[Piece]] = {}
        self._slacks: dict[tuple[What, bool, int], tuple[int, int]] = {}
        self._shares: dict[int, tuple[int, int]] = {}
        tile = probe.typical
        self._whole_head = probe.kernel.grid.launch == "head"
        self._steady_from, sample = STEADY, SAMPLE
        if self._whole_head:
            self._steady_from, sample = STEADY_IN_A_HEAD, SAMPLE_OF_A_HEAD
        elif probe.kernel.copy == "cp.async":
            self._steady_from, sample = STEADY_WITHOUT_RINGS, SAMPLE_WITHOUT_RINGS
        self._sample = tile._replace(count=min(tile.count, sample), partial=min(tile.partial, sample), partial_end=0)

    def _streams(self, tensor: str) -> bool:
        return self.probe.kernel.streams(tensor)

    # Long loops.

    def fold(self, tile: TileClass) -> tuple[TileClass, int, int]:
        """(a short tile of the same kind, ticks that `tile` takes longer, KV tiles that it is longer)."""
        if tile not in self._folds:
            kind = _kind(tile)
            if kind not in self._base:
                self._base[kind] = self._steady(kind)
            length, period, duration = self._base[kind]
            periods = max(0, (tile.count - tile.partial_end - length) // period)
            short = tile._replace(count=tile.count - periods * period)
            self._folds[tile] = short, periods * duration, periods * period
        return self._folds[tile]

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

    # The course of a work tile.

    def course(self, before: tuple[TileClass, ...], tile: TileClass, lowest: int) -> Course:
        """Of `tile`, whose lowest block of keys is `lowest`, after the tiles `before` in the same CTA."""
        tiles, offset = tuple(self.fold(t)[0] for t in (*before[-WINDOW:], tile)), lowest % self.chunk
        if (tiles, tile, offset) not in self._courses:
            self._courses[tiles, tile, offset] = self._course(tiles, tile, offset)
        return self._courses[tiles, tile, offset]

    def _course(self, tiles: tuple[TileClass, ...], tile: TileClass, offset: int) -> Course:
        """Of `tile`; `tiles` are those before it and itself, shortened; `offset` is where in a chunk its keys begin."""
        _, longer, more = self.fold(tile)
        trace = self.probe.run(tiles)
        start = trace.asks[len(tiles) - 1]
        length, period, duration = self._base[_kind(tile)]
        split = length - MARGIN - period + 1

        def when(times: dict[int, int], item: int) -> int:
            if not more or item < split:
                return times[item] - start
            if item >= split + more:
                return times[item - more] + longer - start
            periods = (item - split) // period
            return times[item - periods * period] + periods * duration - start

        marks: list[Mark] = []
        for what, times in trace.moves[len(tiles) - 1].items():
            if not what.moves:
                at = times[0] - start
                marks.append(Mark(at, at, what, what.how == "turn", Piece(0, 0, 0), len(marks)))
                continue
            expected = self.probe.miss if what.is_load and not self.probe.kernel.is_common(what.tensor) else 0
            once = Piece(0, 1, trace.once_byte[len(tiles) - 1][what])
            for piece in self._pieces(what.tensor, tile, offset) if self._streams(what.tensor) else (once,):
                if self._streams(what.tensor):
                    at = when(times, piece.item)
                else:  # once: loads are at the start of a work tile, stores at its end
                    at = times[0] - start + (0 if what.is_load else longer)
                slack, held = self._slack(what, len(tiles) == 1, piece.item)
                number = len(marks)
                marks.append(Mark(at, at, what, False, piece, number))
                marks.append(Mark(at + max(1, held), at + expected + slack * piece.items, what, True, piece, number))
        marks.sort(key=lambda mark: (mark.time, not mark.needed))
        end = trace.end - start + longer
        course = Course(tuple(marks), end if self._one_each else trace.asks[len(tiles)] - start + longer, end)
        return course if self.together == 1 else course.times(self.together)

    def _pieces(self, tensor: str, tile: TileClass, offset: int) -> list[Piece]:
        """The parts of a tensor that streams which are taken together, in the order of the KV tiles."""
        key = (tensor, tile, offset)
        if key not in self._parts:
            self._parts[key] = self._divide(tensor, tile, offset)
        return self._parts[key]

    def _divide(self, tensor: str, tile: TileClass, offset: int) -> list[Piece]:
        work = self.probe.work_tile(tile)
        pieces = []
        item = 0
        while item < tile.count:
            items = min((tile.count - 1 - item + offset) % self.chunk + 1, tile.count - item)
            first: HbmTile = getattr(work, tensor)(item)
            pieces.append(Piece(item, items, first.size_byte + (items - 1) * first.full_byte))
            item += items
        return pieces

    def _slack(self, what: What, first: bool, item: int) -> tuple[int, int]:
        """(ticks by which `what` of KV tile `item` can be late without making the SM wait, ticks from when it is asked
        for, or written, to the first move that has to wait if it is late).

        It is let come a little late, and later than everything else takes. Where warpgroups change their phase to each
        other for good when something is late, one of the two says too little; the larger answer is taken. `first`: in
        the first work tile of a CTA.
        """
        key = (what, first, min(item, self._steady_from))
        if key not in self._slacks:
            sample = self._sample
            tiles = [sample] if self._one_each else [sample] * 2
            tile = 0 if self._one_each or first or not what.is_load else 1
            item = min(key[2], sample.count - 1) if self._streams(what.tensor) else 0
            on_time = self.probe.run(tiles)
            slack = 0
            # Whoever stores goes on, but where HBM is far behind: then by much.
            little = (on_time.end // A_LITTLE,) if what.is_load and not self._whole_head else ()
            for by in (*little, on_time.end):
                late = self.probe.run(tiles, late=Late(what, tile, item, by))
                waited = late.end - on_time.end
                slack = max(slack, by - waited)
            begin = on_time.moves[tile][what][item]
            waiting = [
                time - begin
                for before, after in zip(on_time.moves, late.moves, strict=True)
                for moved, times in before.items()
                for number, time in times.items()
                if time > begin and after[moved][number] - time > waited / 2
            ]
            self._slacks[key] = slack, min(waiting, default=on_time.end - begin)
        return self._slacks[key]

    # Several CTAs at a time.

    def share(self, working: int) -> tuple[int, int]:
        """(ticks that a KV tile takes while `working` CTAs work on one SM, ticks that it takes alone).

        CTAs that share units fall into step in one of a few ways, which differ by several per cent; which one follows
        from how they have started. So they are let start as they do on the device, and follow each other, with the
        spread of the memory's latency, a few times.
        """
        if working not in self._shares:
            typical, turns_each = self.probe.typical, 2 if self.probe.kernel.library else TURNS
            tile = typical._replace(count=min(typical.count, SAMPLE), partial=0, partial_end=0)
            if self._whole_head:  # one long loop, not several that follow each other
                tile, turns_each = tile._replace(count=min(self.probe.typical.count, LONG_SAMPLE)), 1
            interval = self.probe.costs.ns(self.probe.device.launch.cta_interval_ns) * self.probe.device.sm.count
            turns = [tile] * working * turns_each
            traces = [self.probe.run(turns, working, interval, seed=seed) for seed in self._seeds]
            if tile.count > 1 and any(map(len, self.probe.run([tile]).walks)):
                alone = fmean(_gaps(self.probe.run([tile]).walks, 1))
                shared = fmean(gap for trace in traces for gap in _gaps(trace.walks, working))
            else:
                alone = self.probe.run([tile]).end
                shared = fmean((trace.end - interval * (working - 1)) / turns_each for trace in traces)
            # A loop that has nothing to do takes no time, in any company.
            self._shares[working] = (round(max(alone, shared)), round(alone)) if round(alone) else (1, 1)
        return self._shares[working]

    def first_ask(self) -> int:
        """From the start of a CTA to its first question for a tile."""
        return self.probe.run([TileClass(1, 0, False, False)]).asks[0]

    def busy(self, tile: TileClass) -> dict[str, int]:
        """Ticks of work for each unit in `tile`, and FLOPs."""
        short, _, more = self.fold(tile)
        base = self.probe.run([short]).busy
        if not more:
            return base
        longer = self.probe.run([short._replace(count=short.count + 1)]).busy
        return {unit: base[unit] + (longer[unit] - base[unit]) * more for unit in base}


def _gaps(walks: list[list[int]], last: int) -> list[int]:
    """Ticks from KV tile to KV tile, until the first of the `last` walks, and others of their CTAs, ends."""
    end = min(walk[-1] for walk in walks[-last:])
    return [b - a for walk in walks for a, b in pairwise(walk) if b <= end]


def _kind(tile: TileClass) -> TileClass:
    """What decides from where on, and how, the loop of `tile` repeats itself."""
    return tile._replace(count=0, partial_end=0)


def _periodic_from(gaps: list[int], period: int) -> int:
    """The index from which `gaps` repeat themselves after `period`."""
    start = len(gaps) - period
    while start > 0 and gaps[start - 1] == gaps[start - 1 + period]:
        start -= 1
    return start
