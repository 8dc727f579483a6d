"""One warpgroup of a CTA: interprets the verbs of its role's program."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from flashsim.engine import Clock, Completion, Steps, Wait, join
from flashsim.errors import EndlessRun, Hazard, Race, SimulationError, line_of
from flashsim.machine.buffers import Buffer, View
from flashsim.machine.copies import Load, Store
from flashsim.machine.operations import Batch, Overhead, Signal
from flashsim.machine.products import AsyncProduct, SyncProduct
from flashsim.machine.record import Record
from flashsim.machine.statements import SCALED, check_compute, check_copy, check_gemm, is_scalar
from flashsim.machine.tiles import HbmTile, WorkTile
from flashsim.machine.trace import slots_awaited
from flashsim.schedules.base import Role
from flashsim.schedules.verbs import MapOp, Program, ReduceOp
from flashsim.units import cycle_of
from flashsim.watchdog import Stuck

if TYPE_CHECKING:
    from flashsim.machine.cta import CTA


MAX_WAITS_AT_ONCE = 10_000
"""Waits of one warpgroup that may be over at the same tick; more are a loop that will not end."""
MAX_OPERATIONS = 100_000
"""Operations that a warpgroup may issue without a wait between them; more are a loop that will not end."""


class Phrase:
    """A verb with its operands, for messages; put into words only when somebody asks."""

    __slots__ = ("parts", "verb")

    def __init__(self, verb: str, *parts: object) -> None:
        self.verb = verb
        self.parts = parts

    def __str__(self) -> str:
        *operands, into = self.parts
        return f"{self.verb}({', '.join(map(str, operands))}, into={into})"


class Agent:
    """Runs a program: its statements are issued in order, each when everything before it has been accepted.

    The program's Python runs ahead to its next `yield`; what it said until then waits in `_queue` for its time.
    """

    def __init__(self, cta: CTA, role: Role, index: int) -> None:
        self.cta = cta
        self.sm = cta.sm
        self.sim = cta.sim
        self.role = role
        self.index = index
        self.problem = cta.problem
        self.name = f"{role.name} {index}" if role.count > 1 else role.name
        self.record = Record(self) if cta.functional else None
        self.products_end = 0
        """Tick at which the last asynchronous product ends."""
        self.last_store: Completion | None = None
        """The last store by TMA."""
        self.waits_for: Wait | None = None
        self.finished = False
        tma = self.sm.costs.device.tma
        rate = tma.sm_byte_per_ns if tma and cta.kernel.copy == "tma" else self.sm.costs.device.memory.sm_byte_per_ns
        self.link_rate = self.sm.costs.byte_rate(rate)
        self._walk: list[int] | None = None
        if self.sm.walks is not None:
            self._walk = []
            self.sm.walks.append(self._walk)
        self._queue: list[Any] = []
        self._batch: Batch | None = None
        self._program: Any = None
        fragments = role.registers(RegisterFile(cta, self)) if role.registers else None
        self._program = self._start(fragments)

    def _start(self, fragments: Any) -> Program:
        program = self.role.program(self, self.cta.shared, fragments)
        if not hasattr(program, "gi_frame"):
            code = getattr(self.role.program, "__code__", None)
            where = f"{code.co_filename}:{code.co_firstlineno}: " if code else ""
            raise SimulationError(f"{where}the program of {self.name} never yields, so that it waits for nothing")
        return program

    # The process.

    def steps(self, begin: int) -> Steps:
        """The warpgroup's life, from tick `begin`."""
        yield self.sim.at(begin)
        program = self._program
        waits, since = 0, begin
        while True:
            self.cta.speaker = self
            try:
                wait = next(program)
            except StopIteration:
                break
            except (Race, Hazard, EndlessRun):
                raise
            except Stuck as error:
                raise EndlessRun(f"{self._line_of(error)}: {self.name} loops without ever waiting") from None
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit, too: nothing in a program may end the simulator
                raise self._told(error) from error
            waits, since = (waits + 1, since) if since == self.sim.now else (0, self.sim.now)
            if waits > MAX_WAITS_AT_ONCE:
                now = cycle_of(self.sim.now)
                raise SimulationError(f"{self.where()}: {self.name} loops without time going on, in {now}")
            yield from self._issue()
            yield from self._await(wait)
        yield from self._issue()
        self.finished = True
        self.cta.agent_done()

    def _told(self, error: BaseException) -> SimulationError:
        """What `error` in the program comes to, with file and line."""
        what = str(error) if type(error) is SimulationError else f"{type(error).__name__}: {error}"
        return SimulationError(f"{self._line_of(error)}: {self.name}: {what}", getattr(error, "memory", None))

    def _line_of(self, error: BaseException) -> str | None:
        code = getattr(self._program, "gi_code", None)
        return line_of(error, within=code.co_filename if code else None) or line_of(error)

    def _issue(self) -> Steps:
        """Issue everything that the program has said."""
        self._batch = None
        queue, self._queue = self._queue, []
        for operation in queue:
            yield from operation.perform(self)

    def _await(self, wait: Wait) -> Steps:
        if isinstance(wait, Completion) and wait.owner not in (None, self):
            raise SimulationError(
                f"{self.where()}: {self.name} waits for {wait.describe()}, which another warpgroup has issued: only a "
                f"barrier tells of that"
            )
        if not hasattr(wait, "knowledge"):
            raise SimulationError(f"{self.where()}: {self.name} yields {wait!r}, which cannot be waited for")
        trace = self.cta.trace
        touch = trace.note(self, self.name, f"waits for {wait.describe()}", slots_awaited(wait)) if trace else None
        while not wait.ready():
            event = self.sim.event()
            wait.subscribe(event)
            self.waits_for = wait
            yield event
        self.waits_for = None
        if touch:
            touch.end = self.sim.now
        knowledge = wait.knowledge()
        if self.record and knowledge is not None:
            join(self.record.timeline.clock, knowledge)
        if wait.delay:
            yield self.sim.at(self.sim.now + self.sm.vary("barrier", wait.delay))

    def where(self) -> str:
        """File and line of the statement at which the program stands."""
        program: Any = self._program
        if program is None:  # it has no `yield`, and runs while it is made
            return self.name
        frame = _running_in(program.gi_code.co_filename) if program.gi_running else _suspended_in(program)
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else self.name

    def unfinished(self) -> list[str]:
        """Operations that nobody has waited for, at the end of a functional run."""
        if not self.record:
            return []
        known: Clock = {}
        for agent in self.cta.agents:
            if agent.record:
                join(known, agent.record.timeline.clock)
        return self.record.unawaited(known)

    # Signals and verbs (schedules.verbs.Warpgroup).

    def signal(self, send: Any) -> None:
        """Call `send(clock)` when everything said before has been accepted; `clock` is what is known here and now."""
        clock: Clock | None = None
        if self.record:
            self.record.timeline.step()
            clock = dict(self.record.timeline.clock)
        self._say(Signal(send, clock))

    def tiles(self) -> Iterator[WorkTile]:
        index = 0
        while (tile := self.cta.tile(index)) is not None:
            yield tile
            index += 1

    def kv_tiles(self, tile: WorkTile, start: int = 0) -> Iterator[int]:
        return self._inner_tiles("queries", tile, start)

    def q_tiles(self, tile: WorkTile, start: int = 0) -> Iterator[int]:
        return self._inner_tiles("keys", tile, start)

    def _inner_tiles(self, over: str, tile: WorkTile, start: int) -> Iterator[int]:
        if tile.kernel.grid.over != over:
            raise SimulationError(f"{tile} visits the other tiles: its kernel's grid is over {tile.kernel.grid.over}")
        overhead = self.cta.kernel.overhead_instructions
        j = tile.first + start
        while j <= tile.last:
            if overhead:
                self._say(Overhead(overhead))
            if self._walk is not None:
                self._walk.append(self.sim.now)
            yield j
            j += 1

    def load(self, source: HbmTile, into: View) -> Completion:
        check_copy("load", source, into)
        completion = self._completion("load", source, into)
        effect = self.record.load(source, into, completion) if self.record else None
        self._say(Load(source, into, completion, effect))
        return completion

    def store(self, source: View, into: HbmTile) -> Completion:
        check_copy("store", source, into)
        completion = self._completion("store", source, into)
        effect = self.record.store(source, into, completion) if self.record else None
        self._say(Store(source, into, completion, effect))
        return completion

    def atomic_add(self, source: View, into: HbmTile) -> Completion:
        check_copy("atomic_add", source, into)
        completion = self._completion("atomic_add", source, into)
        effect = self.record.store(source, into, completion, add=True) if self.record else None
        self._say(Store(source, into, completion, effect, add=True))
        return completion

    def gemm(self, a: View, b: View, into: View, accumulate: bool = False) -> Completion:
        check_gemm(a, b, into)
        completion = self._completion("gemm", a, b, into)
        asynchronous = self.cta.kernel.mma == "wgmma"
        effect = self.record.gemm(a, b, into, accumulate, completion, asynchronous) if self.record else None
        self._say((AsyncProduct if asynchronous else SyncProduct)(a, b, into, completion, effect))
        return completion

    def map(self, op: MapOp, *operands: Any, into: View) -> Completion:
        scalars = [operand for operand in operands if is_scalar(operand)] if op in SCALED else []
        views = tuple(o for o in operands if isinstance(o, View | HbmTile) and not any(o is s for s in scalars))
        return self._compute("map", op, views, into, operands)

    def reduce(self, op: ReduceOp, tile: View, into: View) -> Completion:
        return self._compute("reduce", op, (tile,), into, ())

    def convert(self, tile: View, into: View) -> Completion:
        return self._compute("convert", "", (tile,), into, ())

    def _compute(self, verb: str, op: str, views: tuple[Any, ...], into: View, operands: tuple[Any, ...]) -> Completion:
        """Add a register operation to the batch that the text is in the middle of."""
        batch = self._batch
        if batch is None:
            batch = Batch(Completion(self.sim, "register operations"))
            self._say(batch)
            self._batch = batch
        kind = self._kind(verb, op, views, into, operands)
        batch.keys.append(kind)
        batch.operations.append((verb, op, views, into))
        self._bound(len(batch.operations))
        if self.record:
            batch.effects.append(self.record.compute(verb, op, views, into, operands))
        return batch.completion

    def _kind(self, verb: str, op: str, views: tuple[Any, ...], into: View, operands: tuple[Any, ...]) -> object:
        """What decides the cost of a register operation; where only time is kept, each kind is checked once."""
        kind: object = None
        if type(into) is View and HbmTile not in map(type, views):
            kind = (verb, op, into.buffer.name, into.shape, *[(v.buffer.name, v.shape) for v in views])
        if kind is None or self.record or kind not in self.sm.checked:
            check_compute(verb, op, views, into, operands)
            self.sm.checked.add(kind)
        return kind

    def _say(self, operation: Any) -> None:
        self._batch = None
        self._queue.append(operation)
        self._bound(len(self._queue))

    def _bound(self, operations: int) -> None:
        if operations > MAX_OPERATIONS:
            raise SimulationError(f"issues {operations} operations and waits for none")

    def _completion(self, verb: str, *parts: object) -> Completion:
        completion = Completion(self.sim, Phrase(verb, *parts))
        completion.owner = self
        return completion


def _running_in(file: str) -> FrameType | None:
    """The innermost frame of what runs now whose text is in `file`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame


def _suspended_in(program: Any) -> FrameType | None:
    """The innermost frame of a generator that waits."""
    while hasattr(program.gi_yieldfrom, "gi_frame"):
        program = program.gi_yieldfrom
    frame: FrameType | None = program.gi_frame
    return frame


class RegisterFile:
    """Where a role declares the register tiles of one warpgroup (schedules.verbs.Registers)."""

    def __init__(self, cta: CTA, agent: Agent) -> None:
        self.cta = cta
        self.kernel = cta.kernel
        self.problem = cta.problem
        self.head_dim, self.head_dim_v = cta.head_dim, cta.head_dim_v
        self.index = agent.index
        self._prefix = f"{agent.name}'s "
        self._warps = agent.role.warps

    def tile(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: str = "fp32",
        over: View | None = None,
        warps: tuple[int, int] | None = None,
    ) -> View:
        layout = warps or (self._warps, 1)
        if layout[0] * layout[1] != self._warps:
            raise SimulationError(f"tile {name} is spread over {layout} warps, there are {self._warps}")
        buffer = Buffer(self._prefix + name, shape, dtype, "registers", self.cta.functional, layout)
        if over:
            buffer.overlay(over.buffer)
        return buffer.whole

    def rows(self, name: str, count: int) -> View:
        return self.tile(name, (count, 1))
