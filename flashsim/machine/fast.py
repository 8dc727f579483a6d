"""The fast path: every SM and every work tile of a kernel, but not every operation.

The grid, the L2 and the HBM are those of the full simulation; what an SM does between two requests is not simulated
again but taken from a few probes of one SM (`pace`).
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from flashsim.devices import DeviceSpec
from flashsim.engine import Event, Simulation, Steps
from flashsim.machine.feasibility import fit
from flashsim.machine.gpu import KernelRun
from flashsim.machine.grid import WorkTiles, tile_count
from flashsim.machine.memory import Key, PrivateMemory, SharedMemory
from flashsim.machine.options import Options
from flashsim.machine.pace import WINDOW, Mark, Pace
from flashsim.machine.probe import Probe, TileClass
from flashsim.machine.sm import UNITS
from flashsim.machine.tiles import Coordinates
from flashsim.masks import KVWalk
from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Kernel
from flashsim.watchdog import Watchdog

MAX_CHUNKS = 6_000
"""KV tiles are taken together, and work tiles that share nothing, as many as it needs to have no more than this."""
MAX_CHUNKS_OF_STREAM = 1_000
"""The same for the kernels of a library and those without an inner loop, which stream through memory at one rate from
their start to their end, and for those whose CTAs have a whole head each, which meet in HBM only."""
FOREVER = sys.maxsize


class _Sm:
    """The CTAs that are resident on an SM, and for how long there have been any."""

    def __init__(self) -> None:
        self.ctas: list[_Cta] = []
        self.since = 0
        self.active = 0

    def at_work(self, now: int) -> int:
        """How many CTAs wait for nothing."""
        working = 0
        for cta in self.ctas:
            working += cta.works_until > now
        return working


class _Tile(NamedTuple):
    """A work tile on its way."""

    where: Coordinates
    walk: KVWalk
    arrivals: dict[int, int]
    """When what has moved is there, by the marks' numbers."""


_Due = tuple[int, Mark, _Tile]
"""A mark of a work tile, and when it is due in the CTA's own time."""


class _Cta:
    """How far a CTA is in its own time, which stands still while it waits and runs slower while it shares its SM."""

    def __init__(self, sim: Simulation, pace: Pace, host: _Sm) -> None:
        self.sim = sim
        self.pace = pace
        self.host = host
        self.reached = 0
        self.works_until = 0
        """The tick from which it waits for something."""
        self.moved: Counter[tuple[str, str]] | None = None
        """What it has the memory do in a work tile that is going to be repeated, as `SharedMemory.accounts` has it."""
        if not host.ctas:
            host.since = sim.now
        host.ctas.append(self)

    def until(self, time: int) -> int:
        """The tick at which `time` will be reached."""
        ahead, now, host = time - self.reached, self.sim.now, self.host
        if ahead <= 0:
            return now
        if len(host.ctas) > 1 and self.works_until > now and (working := host.at_work(now)) > 1:
            shared, alone = self.pace.share(working)
            ahead = ahead * shared // alone
        return now + ahead

    def go_on(self, time: int) -> Steps:
        """Go on until `time`."""
        if time > self.reached:
            yield self.sim.at(self.until(time))
            self.reached = time

    def need(self, time: int, there: int) -> Steps | None:
        """At `time`, something is needed that is there at tick `there`; returns the steps to it, if it takes any."""
        now, reached = self.sim.now, self.until(time)
        works = self.works_until > now
        if max(there, reached) > now and (there > reached or not (works or len(self.host.ctas) == 1)):
            if works:
                self.works_until = reached
            return self._stand_still(time, self.sim.at(max(there, reached)))
        self.works_until = FOREVER
        return None

    def turn(self, event: Event) -> Steps:
        """Stand still until `event`."""
        self.works_until = 0
        return self._stand_still(self.reached, event)

    def _stand_still(self, time: int, event: Event) -> Steps:
        """Until `event`, when `time` is reached."""
        yield event
        self.reached = max(self.reached, time)
        self.works_until = FOREVER

    def leave(self) -> None:
        """The CTA has ended."""
        self.host.ctas.remove(self)
        if not self.host.ctas:
            self.host.active += self.sim.now - self.host.since


@dataclass
class FastSimulation:
    """One kernel on a device. Takes and gives what `FullSimulation` does.

    Timing assumption: a work tile takes its course as it does on an SM whose data is never late; where something is
    late at the point where it is needed, the whole CTA stands still until it is there. CTAs that share an SM advance
    at the rate at which as many CTAs as are not waiting share it.
    """

    device: DeviceSpec
    clock_mhz: float
    kernel: Kernel
    problem: AttentionProblem
    options: Options = field(default_factory=Options)

    def run(self) -> KernelRun:
        """Simulate. Raises Infeasible if the kernel does not fit."""
        self._sim = Simulation()
        self._probe = Probe(self.device, self.clock_mhz, self.kernel, self.problem)
        with Watchdog(lambda: self._sim.events + self._probe.events):  # one for all the probes, too
            return self._run()

    def _run(self) -> KernelRun:
        k, p = self.kernel, self.problem
        per_sm = fit(k, p, self.device).ctas_per_sm
        probe = self._probe
        total = probe.kv_tiles
        # Work tiles that have nothing in common can be taken together: their traffic just adds up.
        common = k.grid.launch != "cta" or any(map(k.is_common, probe.tensors))
        streams = k.library or k.walk == "none" or k.grid.launch == "head"
        chunks = MAX_CHUNKS_OF_STREAM if streams else MAX_CHUNKS
        together = self._together = 1 if common else max(1, tile_count(k, p) // chunks)
        self._pace = Pace(probe, max(1, total // chunks // together), together, not self.options.private_memory)
        costs = probe.costs
        sim = self._sim
        tma = k.copy == "tma"
        shared = SharedMemory(sim, costs, tma, self.options.seed, self.options.held_by(k.name))
        self._memory = PrivateMemory(sim, costs, tma, k.is_common) if self.options.private_memory else shared
        self._done: dict[TileClass, int] = {}
        self._passed: dict[Coordinates, Event] = {}
        self._known: dict[str, tuple[int, bool, bool, bool]] = {}
        sms = [_Sm() for _ in range(self.device.sm.count)]
        launch = self._end = costs.ns(self.device.launch.kernel_us * 1000)
        interval = costs.ns(self.device.launch.cta_interval_ns)
        grid = self._grid = WorkTiles(k, p, len(sms) * per_sm, together)
        for slot in range(min(grid.slots, grid.count)):
            sim.start(self._slot(sms[slot % len(sms)], launch + slot * interval, grid.of_slot(slot)))
        sim.run(watched=False)
        busy = dict.fromkeys((*UNITS, "flop"), 0)
        for tile, times in self._done.items():
            for unit, work in self._pace.busy(tile).items():
                busy[unit] += work * times
        busy |= {"l2": shared.l2.busy_until(self._end), "hbm": shared.hbm.busy_until(self._end)}
        return KernelRun(
            ticks=self._end,
            launch=launch,
            active=sum(sm.active for sm in sms),
            flop=busy.pop("flop"),
            busy=busy,
            read_byte=shared.read_byte,
            written_byte=shared.written_byte,
            events=sim.events + probe.events,
            ctas_per_sm=per_sm,
        )

    def _slot(self, host: _Sm, begin: int, source: Iterator[Coordinates]) -> Steps:
        """The CTAs that follow each other in one slot of an SM."""
        yield self._sim.at(begin)
        if self._grid.many_ctas:
            while tiles := self._grid.of_next_cta():
                yield from self._cta(host, iter(tiles))
        else:
            yield from self._cta(host, source)

    def _cta(self, host: _Sm, source: Iterator[Coordinates]) -> Steps:
        """The life of one CTA: its work tiles' courses one after the other, as far as nothing holds it up."""
        probe = self._probe
        cta = _Cta(self._sim, self._pace, host)
        asked = end = 0 if self.kernel.grid.launch == "cta" else self._pace.first_ask()
        before: tuple[TileClass, ...] = ()
        pending: deque[_Due] = deque()
        yield from cta.go_on(asked)
        # Of a CTA that has all tiles of a head, it is known what will follow.
        ahead = deque(source) if self.kernel.grid.launch == "head" else None
        alike = 0
        while (where := next(source, None) if ahead is None else ahead.popleft() if ahead else None) is not None:
            tile, walk = probe.class_of(where), probe.walk_at(where)
            self._done[tile] = self._done.get(tile, 0) + self._together
            course = self._pace.course(before, tile, walk.blocks[-1] if walk.blocks else 0)
            alike = alike + 1 if before[-1:] == (tile,) else 0
            before = (*before, tile)[-WINDOW:]
            times = self._alike_ahead(ahead, tile) - 1 if ahead and alike > WINDOW else 0
            since, cta.moved = self._sim.now, Counter() if times > 0 else None
            this = _Tile(where, walk, {})
            new = [(asked + mark.time, mark, this) for mark in course.marks]
            # At one time, what has to wait comes before what moves: nothing moves that waits for something.
            pending = deque(sorted([*pending, *new], key=lambda due: (due[0], not due[1].needed)) if pending else new)
            end, asked = asked + course.end, asked + course.step
            yield from self._pass(cta, pending, asked)
            if ahead and cta.moved is not None:
                yield self._sim.at(self._sim.now + times * (self._sim.now - since))
                for _ in range(times):
                    ahead.popleft()
                self._repeat(cta.moved, times)
                self._done[tile] += times * self._together
                later = times * course.step
                cta.reached, asked, end = cta.reached + later, asked + later, end + later
                pending = deque((time + later, mark, tile) for time, mark, tile in pending)
        yield from self._pass(cta, pending, end)
        cta.leave()
        self._end = max(self._end, self._sim.now)

    def _alike_ahead(self, ahead: deque[Coordinates], tile: TileClass) -> int:
        """How many of the next work tiles are of this class."""
        return next((n for n, where in enumerate(ahead) if self._probe.class_of(where) != tile), len(ahead))

    def _repeat(self, moved: Counter[tuple[str, str]], times: int) -> None:
        """Let as much move `times` more as a work tile has moved. Timing assumption: it takes as long as before."""
        if isinstance(self._memory, SharedMemory):
            for (tensor, what), amount in moved.items():
                self._memory.account(tensor, what, amount * times)

    def _pass(self, cta: _Cta, pending: deque[_Due], until: int) -> Steps:
        """Go on to `until` in the CTA's own time, past every mark on the way."""
        sim = self._sim
        while pending and pending[0][0] <= until:
            time, mark, tile = pending.popleft()
            how = mark.what.how
            if how == "turn":
                yield from self._await_turn(cta, time, tile)
            elif mark.needed:
                steps = cta.need(time, tile.arrivals[mark.number] - (mark.due - mark.time))
                if steps is not None:
                    yield from steps
            else:
                if time > cta.reached:
                    yield sim.at(cta.until(time))
                    cta.reached = time
                if how == "pass":
                    sim.fire(self._passing(tile.where))
                else:
                    tile.arrivals[mark.number] = self._move(cta, mark, tile)
        yield from cta.go_on(until)

    def _await_turn(self, cta: _Cta, time: int, tile: _Tile) -> Steps:
        """Wait for the work tile before this one, if it begins with the same block: from then on it is ahead."""
        yield from cta.go_on(time)
        where = tile.where
        before = where._replace(block=where.block - 1)
        if where.block and self._probe.walk_at(before).first == tile.walk.first:
            event = self._passing(before)
            if not event.triggered:
                yield from cta.turn(event)

    def _passing(self, where: Coordinates) -> Event:
        """When the work tile there first lets the next one go on."""
        return self._passed.setdefault(where, self._sim.event())

    def _move(self, cta: _Cta, mark: Mark, tile: _Tile) -> int:
        """Let the memory have what moves at `mark`; returns when it can go on."""
        memory = self._memory
        if cta.moved is None or not isinstance(memory, SharedMemory):
            return self._ask(mark, tile)
        before = memory.accounts(mark.what.tensor)
        there = self._ask(mark, tile)
        cta.moved += memory.accounts(mark.what.tensor) - before
        return there

    def _axes(self, name: str) -> tuple[int, bool, bool, bool]:
        """Of a tensor: how many of the grid's heads share one of its heads, whether it streams, whether work tiles have
        parts of it in common, and whether it has splits."""
        if name not in self._known:
            k, tensor = self.kernel, self.kernel.tensor(name)
            each = self.problem.heads_per_kv if tensor.heads == "kv" and k.grid.heads == "q" else 1
            self._known[name] = each, k.streams(name), k.is_common(name), tensor.splits
        return self._known[name]

    def _ask(self, mark: Mark, tile: _Tile) -> int:
        _, _, (tensor, how), _, piece, _ = mark
        block, head, batch, split = tile.where
        heads_each, streams, is_common, splits = self._axes(tensor)
        row, column = block, 0
        if streams:
            chunk = tile.walk.blocks[piece.item + piece.items - 1] // self._pace.chunk
            row, column = (chunk, 0) if is_common else (block, chunk)
        key: Key = (tensor, batch, head // heads_each, row, column, split if splits else 0)
        if how == "fetch":
            return self._memory.fetch(key, piece.size_byte, self.kernel.cluster if is_common else 1)
        return (self._memory.write if how == "write" else self._memory.add)(key, piece.size_byte)
