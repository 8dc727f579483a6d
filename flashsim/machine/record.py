"""The functional side of a warpgroup: who may touch what when, and what comes out.

Accesses are checked when the program states them, in program order; numbers are computed when the operation ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flashsim.engine import Access, Clock, Completion, Part, Timeline
from flashsim.errors import FlashsimError, SimulationError
from flashsim.machine.buffers import Buffer, View
from flashsim.machine.statements import SCALED, is_scalar
from flashsim.machine.tiles import HbmTile
from flashsim.machine.trace import Touch
from flashsim.schedules.tensors import INPUTS

if TYPE_CHECKING:
    from flashsim.machine.agent import Agent

Effect = Callable[[], None]


class Record:
    """Timelines of one warpgroup.

    Its own; one for its products and one for its stores, which complete in order of issue (wgmma groups and bulk-copy
    groups are waited for in commit order); and one for the loads into each place, which complete in any order. A second
    load into a place before the first has been waited for is a race.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.timeline = Timeline(agent.name)
        self._products = Timeline(f"a product of {agent.name}")
        self._stores = Timeline(f"a store of {agent.name}")
        self._loads: dict[tuple[Buffer, Part], Timeline] = {}

    def _asynchronous(self, on: Timeline, completion: Completion, in_order: bool) -> tuple[int, Clock]:
        """(number of the operation on its timeline, what it knows when it begins); sets what its end tells."""
        number = on.step()
        known = dict(self.timeline.clock)
        completion.clock = {**known, on: number}
        return number, {**known, on: number} if in_order else known

    def _read(self, view: View, on: Timeline, number: int, known: Clock, what: str) -> None:
        memory = view.buffer.memory
        assert memory is not None
        memory.read(Access(on, number, view.part, what, self.agent.sim.now), known)

    def _write(self, view: View, on: Timeline, number: int, known: Clock, what: str) -> None:
        memory = view.buffer.memory
        assert memory is not None
        memory.write(Access(on, number, view.part, what, self.agent.sim.now), known)

    def _in_hbm(self, tile: HbmTile, on: Timeline, number: int, known: Clock, what: str, how: str) -> None:
        """`how`: read, write or add."""
        if how != "read" and tile.tensor in INPUTS:
            raise SimulationError(f"{what} writes over an input")
        access = Access(on, number, tile.part, what, self.agent.sim.now)
        hbm = self.agent.cta.hbm
        assert hbm is not None
        getattr(hbm.of(tile), how)(access, known)

    def _until_its_end(self, touch: Touch | None, effect: Effect) -> Effect:
        """`effect`, which is called when the operation ends; tells the trace, and where it was said if it fails."""
        where = self.agent.where()

        def ended() -> None:
            try:
                effect()
            except FlashsimError:
                raise
            except Exception as error:
                name = self.agent.name
                raise SimulationError(f"{where}: {name}: {type(error).__name__}: {error}") from error
            if touch:
                touch.end = self.agent.sim.now

        return ended

    def _note(self, who: str, what: object, reads: tuple[View, ...], into: View | None) -> Touch | None:
        trace = self.agent.cta.trace
        if trace is None:
            return None
        uses = {view.buffer.name: "reads" for view in reads} | ({into.buffer.name: "writes"} if into else {})
        return trace.note(self.agent, who, str(what), uses)

    def _round(self, array: Any, dtype: str) -> Any:
        if not self.agent.cta.rounded:
            return array
        from flashsim.numerics.rounding import round_to, saturate

        # cvt.rn.satfinite is the only conversion to 8 bits that there is.
        return round_to(saturate(array, "e4m3"), "e4m3") if dtype == "fp8" else round_to(array, dtype)

    def unawaited(self, known: Clock) -> list[str]:
        """Operations whose end nobody knows of, given what everybody knows together."""
        queues = [self._products, self._stores, *self._loads.values()]
        return [
            f"nobody waits for the end of {q.name} ({q.count} of them)" for q in queues if known.get(q, 0) < q.count
        ]

    def load(self, source: HbmTile, into: View, completion: Completion) -> Effect:
        on = self._loads.setdefault((into.buffer, into.part), Timeline(f"a load into {into}"))
        number, known = self._asynchronous(on, completion, in_order=False)
        touch = self._note(self.agent.name, completion.what, (), into)
        self._write(into, on, number, known, str(completion.what))
        if source.tensor not in INPUTS:
            self._in_hbm(source, on, number, known, str(completion.what), "read")
        tensors = self.agent.cta.tensors
        assert tensors is not None
        return self._until_its_end(touch, lambda: into.assign(source.read(tensors)))

    def store(self, source: View, into: HbmTile, completion: Completion, add: bool = False) -> Effect:
        tensors = self.agent.cta.tensors
        assert tensors is not None
        what = str(completion.what)
        touch = self._note(self.agent.name, what, (source,), None)
        how = "add" if add else "write"

        def effect() -> None:
            array = into.read(tensors) + source.numbers() if add else source.numbers()
            into.write(tensors, self._round(array, into.dtype))

        if source.place == "registers":  # read when issued, as every st instruction does
            number, known = self.timeline.step(), self.timeline.clock
            self._read(source, self.timeline, number, known, what)
            self._in_hbm(into, self.timeline, number, known, what, how)
            return self._until_its_end(touch, effect)
        number, known = self._asynchronous(self._stores, completion, in_order=True)
        self._read(source, self._stores, number, known, what)
        self._in_hbm(into, self._stores, number, known, what, how)
        return self._until_its_end(touch, effect)

    def gemm(
        self, a: View, b: View, into: View, accumulate: bool, completion: Completion, asynchronous: bool
    ) -> Effect:
        on, known = self.timeline, self.timeline.clock
        if asynchronous:
            on = self._products
            number, known = self._asynchronous(on, completion, in_order=True)
        else:
            number = on.step()
        what = str(completion.what)
        touch = self._note(self.agent.name, what, (a, b), into)
        for operand in (a, b, *((into,) if accumulate else ())):
            self._read(operand, on, number, known, what)
        self._write(into, on, number, known, what)

        def effect() -> None:
            product = a.numbers() @ b.numbers()
            into.assign(self._round(into.numbers() + product if accumulate else product, into.dtype))

        return self._until_its_end(touch, effect)

    def compute(self, verb: str, op: str, views: tuple[View, ...], into: View, operands: tuple[Any, ...]) -> Effect:
        """A register operation, ordered by the scoreboard."""
        from flashsim.numerics.hadamard import hadamard_transform
        from flashsim.numerics.verbs import HADAMARD_SEED, MAP, REDUCE

        number, known = self.timeline.step(), self.timeline.clock
        what = f"{verb}({', '.join([op] * bool(op) + [str(v) for v in views])}, into={into})"
        reads = views + ((into,) if verb == "reduce" else ())
        touch = self._note(self.agent.name, what, reads, into)
        for view in reads:
            self._read(view, self.timeline, number, known, what)
        self._write(into, self.timeline, number, known, what)
        scale = 1.0 if self.agent.cta.kernel.scaled_scores else self.agent.problem.softmax_scale
        scalars = [operand for operand in operands if is_scalar(operand)] if op in SCALED else []
        for scalar in scalars:
            if isinstance(scalar, HbmTile):
                self._in_hbm(scalar, self.timeline, number, known, what, "read")

        def effect() -> None:
            import numpy as np

            arrays = [view.numbers() for view in views]
            if op == "fill":
                result = np.full(into.shape, operands[0])
            elif op == "mask":
                result = np.where(self._allowed(views[0], *operands[1:]), arrays[0], -np.inf)
            elif op == "dropout":
                result = arrays[0] * self._kept(views[0], *operands[1:]) / (1 - self.agent.problem.dropout)
            elif op == "scale":
                result = scale * arrays[0]
            elif op == "hadamard":
                result = hadamard_transform(arrays[0], HADAMARD_SEED)
            elif verb == "map" and op not in ("copy", "permute"):
                factors = [s.read(self.agent.cta.tensors or {}) if isinstance(s, HbmTile) else s for s in scalars]
                result = arrays[0]
                for other in arrays[1:]:
                    result = MAP[op](result, other, scale)
                for factor in factors:
                    result = MAP["div" if op == "div" else "mul"](result, np.asarray(factor, dtype=np.float64), scale)
            elif verb == "reduce":
                result = REDUCE[op](arrays[0], into.numbers())
            else:
                result = arrays[0].copy()
            into.assign(self._round(result, into.dtype))

        return self._until_its_end(touch, effect)

    def _where(self, scores: View, tile: Any, j: int, row: int | None = None, column: int = 0) -> tuple[Any, Any]:
        """The queries and the keys of scores which begin at this row and column of the work tile's tile j."""
        import numpy as np

        rows, columns = scores.shape
        first_row, first_column = tile.origin(j)
        row = self.agent.index * rows if row is None else row
        return first_row + row + np.arange(rows), first_column + column + np.arange(columns)

    def _allowed(self, scores: View, tile: Any, *where: int) -> Any:
        """Which scores the mask leaves."""
        from flashsim.problem import allowed

        return allowed(self.agent.problem, *self._where(scores, tile, *where), tile.where.batch)

    def _kept(self, scores: View, tile: Any, *where: int) -> Any:
        """Which elements dropout leaves."""
        from flashsim.numerics.philox import keep

        queries, keys = self._where(scores, tile, *where)
        return keep(queries, keys, tile.where.batch, tile.where.head, self.agent.problem.dropout)
