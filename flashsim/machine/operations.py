"""What happens in time when a warpgroup issues: each operation takes the units of the SM that it needs, in order.

`perform` is a step of the warpgroup's process: it returns when the operation has been *accepted*, so that what follows
in the text can be issued. `completion` tells when it has *ended*. `effect`, in a functional run, computes the numbers, at
the tick at which the operation ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flashsim.engine import Clock, Completion, Steps
from flashsim.machine.buffers import View
from flashsim.machine.costs import EXP_CHUNKS, MAP_COUNT, REDUCE_COUNT, THREADS, Phase
from flashsim.machine.tiles import HbmTile
from flashsim.units import ticks

if TYPE_CHECKING:
    from flashsim.machine.agent import Agent

Effect = Callable[[], None] | None


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
    """Instructions of the loop around the verbs."""

    __slots__ = ("instructions",)

    def __init__(self, instructions: int) -> None:
        self.instructions = instructions

    def perform(self, agent: Agent) -> Steps:
        costs = agent.sm.costs
        yield agent.sim.at(
            agent.sm.serve(agent.sm.units["issue"], ticks(self.instructions * costs.clk_per_instruction["issue"]))
        )


class Batch:
    """Register operations that follow each other in the text: map, reduce, convert.

    Timing assumption: the compiler interleaves them, so units work side by side and an element passes from one to the
    next as soon as it is there; only a use of a row maximum has to wait until the whole row has been seen. So a batch is
    a sequence of phases: in each, every unit does its share of the work, and the slowest decides.
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
                chunk = phase.exp // EXP_CHUNKS
                for _ in range(EXP_CHUNKS - 1):
                    yield sim.at(sm.serve(sm.exp, chunk))
                end = max(end, sm.serve(sm.exp, phase.exp - chunk * (EXP_CHUNKS - 1)))
            yield sim.at(end + sm.vary("latency", phase.latency))
        for effect in self.effects:
            effect()
        self.completion.done()


def plan(agent: Agent, operations: list[tuple[str, str, tuple[View, ...], View]]) -> list[Phase]:
    """The phases of a batch; see `Batch`. Operations without work make no phase."""
    costs = agent.sm.costs
    phases = [Phase()]
    maxima: set[int] = set()
    for verb, op, operands, into in operations:
        if any(id(operand.buffer) in maxima for operand in operands):
            phases[-1].latency = costs.row_reduce
            phases.append(Phase())
            maxima.clear()
        tile = operands[0] if operands else into
        # A row vector: one value for each row, held by the four threads of a quad.
        values = tile.shape[0] / 32 if tile.shape[1] == 1 else tile.shape[0] * tile.shape[1] / THREADS
        if verb == "map":
            costs.add(phases[-1], MAP_COUNT[op], values)
        elif verb == "reduce":
            costs.add(phases[-1], REDUCE_COUNT[op], values)
            if op == "max":
                maxima.add(id(into.buffer))
        else:
            costs.add_pack(phases[-1], values)
            if into.place == "shared":
                phases[-1].work["smem"] = phases[-1].work.get("smem", 0) + costs.smem(into.size_byte)
                phases[-1].latency = costs.smem_latency
    return [phase for phase in phases if phase.work or phase.exp]


class AsyncProduct:
    """A product by wgmma.

    Timing assumption: the tensor cores take products in order of arrival, each whole; issue blocks until the last
    instruction of the product has been taken, and the result is there `drain_clk` later. A product that follows another
    of the same warpgroup finds the pipe filled; the first one pays `fill_clk` (Luo et al., arXiv 2501.12084, and the
    group completion times quoted in the device file).
    """

    __slots__ = ("a", "b", "completion", "effect")

    def __init__(self, a: View, b: View, completion: Completion, effect: Effect) -> None:
        self.a = a
        self.b = b
        self.completion = completion
        self.effect = effect

    def perform(self, agent: Agent) -> Steps:
        sm, sim = agent.sm, agent.sim
        duration, read = sm.costs.wgmma(self.a.shape[0], self.b.shape[1], self.a.shape[1], self.a.place == "shared")
        if sim.now >= agent.products_end:
            yield sim.at(sim.now + sm.vary("fill", sm.costs.wgmma_fill))
        accepted = sm.serve(sm.tensor, duration)
        # The operands' reads are part of the issue interval; they are counted, and do not hold up others.
        sm.smem.busy += sm.costs.smem(read)
        yield sim.at(accepted)
        agent.products_end = sim.now + sm.vary("drain", sm.costs.wgmma_drain)
        sim.call(agent.products_end, self._end)

    def _end(self) -> None:
        if self.effect:
            self.effect()
        self.completion.done()


class SyncProduct:
    """A product by mma.sync, its operands fetched by LDSM.

    Timing assumption: in each warp, the LDSMs of step k + 1 stand before the MMAs of step k in program order and each
    holds the warp until the port has served it, so port and tensor time add; they overlap with those of other warps
    only. The port serves one LDSM at a time and the tensor cores the MMAs of one step, first come, first served: with one
    request of each warp outstanding that is round robin.
    """

    __slots__ = ("a", "b", "completion", "effect")

    def __init__(self, a: View, b: View, completion: Completion, effect: Effect) -> None:
        self.a = a
        self.b = b
        self.completion = completion
        self.effect = effect

    def perform(self, agent: Agent) -> Steps:
        sm, sim, costs = agent.sm, agent.sim, agent.sm.costs
        m, k, n = *self.a.shape, self.b.shape[1]
        steps, mma, ldsms, ldsm = costs.mma_sync(m, n, k, self.a.place == "shared")
        for step in range(steps + 1):
            fragments = sim.now  # of step - 1, whose LDSMs were the last to be served
            if step < steps:
                for _ in range(ldsms):
                    yield sim.at(sm.serve(sm.smem, ldsm))
            if step > 0:
                there = fragments + sm.vary("latency", costs.smem_latency)
                if there > sim.now:
                    yield sim.at(there)
                yield sim.at(sm.serve(sm.tensor, mma))
        yield sim.at(sim.now + sm.vary("latency", costs.mma_latency))
        if self.effect:
            self.effect()
        self.completion.done()


class Load:
    """A copy from HBM to shared memory or registers.

    Timing assumption: a request goes to L2, from there to HBM if L2 does not hold the tile; the tile then crosses the
    SM's link. TMA holds the issuing warp for `issue_clk`; cp.async and plain loads for four cycles an instruction of
    16 bytes a thread, and they take the port of the shared memory, which is also that of the L1, when the data arrives.
    """

    __slots__ = ("completion", "effect", "into", "source")

    def __init__(self, source: HbmTile, into: View, completion: Completion, effect: Effect) -> None:
        self.source = source
        self.into = into
        self.completion = completion
        self.effect = effect

    def perform(self, agent: Agent) -> Steps:
        sm, sim = agent.sm, agent.sim
        sim.start(self._travel(agent))
        if self._by_tma(agent):
            tma = sm.costs.device.tma
            assert tma is not None
            yield sim.at(sm.serve(sm.tma, ticks(tma.issue_clk)))
        else:
            instructions = -(-self.into.size_byte // (16 * THREADS))
            yield sim.at(sim.now + sm.vary("issue", ticks(4 * instructions)))

    def _by_tma(self, agent: Agent) -> bool:
        return agent.cta.kernel.copy == "tma" and self.into.place == "shared"

    def _travel(self, agent: Agent) -> Steps:
        sm, sim = agent.sm, agent.sim
        size = self.source.size_byte
        sharers = agent.cta.kernel.cluster if self.source.tensor in ("K", "V") else 1
        ready = sm.memory.fetch(self.source.key, size, sharers)
        if ready > sim.now:
            yield sim.at(ready)
        crossed = sm.serve(sm.link, agent.link_rate(size))
        yield sim.at(crossed + sm.vary("memory", sm.memory.latency))
        if not self._by_tma(agent):
            yield sim.at(sm.serve(sm.smem, sm.costs.smem(self.into.size_byte)))
        if self.effect:
            self.effect()
        self.completion.done()
        if self.into.buffer.ring:
            self.into.buffer.ring.landed(self.into.buffer.slot, self.completion.clock)


class Store:
    """A copy to HBM.

    Timing assumption: from shared memory, TMA reads the tile through the port while the warp goes on, and the slot is
    free when L2 has taken it; from registers, the tile passes through shared memory first, so that the stores coalesce,
    and the warp is held until the port has let it through twice and the link and L2 have taken it.
    """

    __slots__ = ("completion", "effect", "into", "source")

    def __init__(self, source: View, into: HbmTile, completion: Completion, effect: Effect) -> None:
        self.source = source
        self.into = into
        self.completion = completion
        self.effect = effect

    def perform(self, agent: Agent) -> Steps:
        sm, sim = agent.sm, agent.sim
        size = self.into.size_byte
        if self.source.place == "registers":
            if self.effect:  # st reads its registers when it is issued
                self.effect()
                self.effect = None
            if self.source.shape[1] > 1:
                yield sim.at(sm.serve(sm.smem, 2 * sm.costs.smem(size)))
            crossed = sm.serve(sm.link, agent.link_rate(size))
            yield sim.at(max(crossed, sm.memory.write(self.into.key, size)))
            self.completion.done()
            return
        tma = sm.costs.device.tma
        assert tma is not None
        sim.start(self._travel(agent))
        yield sim.at(sm.serve(sm.tma, ticks(tma.issue_clk)))

    def _travel(self, agent: Agent) -> Steps:
        sm, sim = agent.sm, agent.sim
        size = self.into.size_byte
        yield sim.at(sm.serve(sm.smem, sm.costs.smem(size)))
        yield sim.at(sm.serve(sm.link, agent.link_rate(size)) + sm.vary("memory", sm.memory.latency))
        yield sim.at(sm.memory.write(self.into.key, size))
        if self.effect:
            self.effect()
        self.completion.done()
