"""What happens in time when a warpgroup issues: each operation takes the units of the SM that it needs, in order.

`perform` is a step of the warpgroup's process: it returns when the operation has been *accepted*, so that what follows
in the text can be issued. `completion` tells when it has *ended*. `effect`, in a functional run, computes the
numbers, at the tick at which the operation ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from flashsim.engine import Clock, Completion, Steps
from flashsim.machine.buffers import View
from flashsim.machine.costs import EXP_CHUNKS, MAP_COUNT, REDUCE_COUNT, THREADS, TRANSPOSE_INSTRUCTIONS, Count, Phase
from flashsim.schedules.tensors import WIDTHS
from flashsim.units import ticks

if TYPE_CHECKING:
    from flashsim.machine.agent import Agent

Effect = Callable[[], None] | None
TRANSPOSE = Count(alu=TRANSPOSE_INSTRUCTIONS)


class Signal:
    """An arrival, a release or a turn passed on: takes no time, but its place in the order of issue."""

    __slots__ = ("clock", "send")

    def __init__(self, send: Callable[[Clock | None], object], clock: Clock | None) -> None:
        self.send = send
        self.clock = clock

    def perform(self, agent: Agent) -> Steps:
        self.send(self.clock)
        return
        yield


class Overhead:
    """Instructions of the loop around the verbs, which every warp issues."""

    __slots__ = ("instructions",)

    def __init__(self, instructions: int) -> None:
        self.instructions = instructions

    def perform(self, agent: Agent) -> Steps:
        each = agent.sm.costs.clk_per_instruction["issue"] * agent.role.warps / 4
        yield agent.sim.at(agent.sm.serve(agent.sm.units["issue"], ticks(self.instructions * each)))


class Batch:
    """Register operations that follow each other in the text: map, reduce, convert.

    Timing assumption: the compiler interleaves them, so units work side by side and an element passes from one to the
    next as soon as it is there; only a use of a row maximum has to wait until the whole row has been seen, as a row sum
    does that others are to see. What is read from shared memory is asked for when a phase begins, all at once. So a
    batch is a sequence of phases: in each, every unit does its share of the work, and the slowest decides.
    """

    __slots__ = ("completion", "effects", "keys", "operations")

    def __init__(self, completion: Completion) -> None:
        self.completion = completion
        self.keys: list[object] = []
        self.operations: list[tuple[str, str, tuple[View, ...], View]] = []
        """(verb, op, operands, into)"""
        self.effects: list[Callable[[], None]] = []

    def perform(self, agent: Agent) -> Steps:
        sm, sim = agent.sm, agent.sim
        key = (agent.role.name, *self.keys)
        phases = sm.phases.get(key)
        if phases is None:
            phases = sm.phases[key] = plan(agent, self.operations)
        for phase in phases:
            end = sim.now
            for name, duration in phase.work.items():
                end = max(end, sm.serve(sm.units[name], duration))
            if phase.exp:
                chunks = max(1, EXP_CHUNKS * agent.role.warps // 4)
                chunk = phase.exp // chunks
                for _ in range(chunks - 1):
                    yield sim.at(sm.serve(sm.exp, chunk))
                end = max(end, sm.serve(sm.exp, phase.exp - chunk * (chunks - 1)))
            yield sim.at(end + sm.vary("latency", phase.latency))
        for effect in self.effects:
            effect()
        self.completion.done()


def plan(agent: Agent, operations: list[tuple[str, str, tuple[View, ...], View]]) -> list[Phase]:
    """The phases of a batch; see `Batch`. Operations without work make no phase."""
    costs = agent.sm.costs
    phases = [Phase(), Phase()]  # in turn: what is read from shared memory, and what is done with it
    maxima: set[int] = set()
    sums: set[int] = set()
    for verb, op, operands, into in operations:
        reduced = maxima | sums if verb == "convert" and into.place == "shared" else maxima
        if any(id(operand.buffer) in reduced for operand in operands):
            phases[-1].latency = costs.row_reduce
            phases += Phase(), Phase()
            maxima.clear()
            sums.clear()
        fetched = sum(operand.size_byte for operand in operands if operand.place == "shared")
        if fetched:
            phases[-2].work["smem"] = phases[-2].work.get("smem", 0) + costs.smem(fetched)
            phases[-2].latency = costs.smem_latency
        tile = operands[0] if operands else into
        # A row vector: one value for each row, held by the four threads of a quad.
        values = tile.shape[0] / 32 if tile.shape[1] == 1 else tile.shape[0] * tile.shape[1] / THREADS
        if verb == "map":
            steps = math.log2(tile.shape[1]) if op == "hadamard" else 1
            costs.add(phases[-1], MAP_COUNT[op], steps * values)
        elif verb == "reduce":
            costs.add(phases[-1], REDUCE_COUNT[op], values)
            if tile.place == "registers":  # its row lies in the four threads of a quad
                (sums if op == "sum" else maxima).add(id(into.buffer))
        else:
            if WIDTHS[into.dtype] < WIDTHS[tile.dtype]:
                costs.add_pack(phases[-1], values)
            elif tile.flipped and WIDTHS[tile.dtype] == 1:
                costs.add(phases[-1], TRANSPOSE, values)
            if into.place == "shared":
                phases[-1].work["smem"] = phases[-1].work.get("smem", 0) + costs.smem(into.size_byte)
                phases[-1].latency = costs.smem_latency
    return [phase for phase in phases if phase.work or phase.exp]
