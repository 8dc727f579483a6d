"""Copies between HBM and an SM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashsim.engine import Completion, Steps
from flashsim.machine.buffers import View
from flashsim.machine.operations import Effect
from flashsim.machine.tiles import HbmTile
from flashsim.units import ticks

if TYPE_CHECKING:
    from flashsim.machine.agent import Agent


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
            instructions = -(-self.into.size_byte // (16 * 32 * agent.role.warps))
            yield sim.at(sim.now + sm.vary("issue", ticks(4 * instructions)))

    def _by_tma(self, agent: Agent) -> bool:
        return agent.cta.kernel.copy == "tma" and self.into.place == "shared"

    def _travel(self, agent: Agent) -> Steps:
        sm, sim = agent.sm, agent.sim
        size = self.source.size_byte
        sharers = agent.cta.sharers(self.source.tensor)
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


RED_BYTE_PER_CLK = 32
"""What the port of the shared memory, which is also that of the L1, lets through of atomic additions: one sector."""


class Store:
    """A copy to HBM, or an atomic addition to what is there.

    Timing assumption: from shared memory, TMA reads the tile through the port while the warp goes on, and the slot is
    free when L2 has taken it; from registers, the tile passes through shared memory first, so that the stores coalesce,
    and the warp is held until the port has let it through twice and the link and L2 have taken it. An addition from
    registers (RED) does not: the port takes it a sector at a time.
    """

    __slots__ = ("add", "completion", "effect", "into", "source")

    def __init__(self, source: View, into: HbmTile, completion: Completion, effect: Effect, add: bool = False) -> None:
        self.source = source
        self.into = into
        self.completion = completion
        self.effect = effect
        self.add = add

    def perform(self, agent: Agent) -> Steps:
        sm, sim = agent.sm, agent.sim
        size = self.into.size_byte
        if self.source.place == "registers":
            if self.effect:  # st and red read their registers when they are issued
                self.effect()
                self.effect = None
            if self.add:
                yield sim.at(sm.serve(sm.smem, ticks(size / RED_BYTE_PER_CLK)))
            elif self.source.shape[1] > 1:
                yield sim.at(sm.serve(sm.smem, 2 * sm.costs.smem(size)))
            crossed = sm.serve(sm.link, agent.link_rate(size))
            yield sim.at(max(crossed, self._arrive(agent, size)))
            self.completion.done()
            return
        tma = sm.costs.device.tma
        assert tma is not None
        sim.start(self._travel(agent, agent.last_store))
        agent.last_store = self.completion
        yield sim.at(sm.serve(sm.tma, ticks(tma.issue_clk)))

    def _travel(self, agent: Agent, before: Completion | None) -> Steps:
        """`before` is the store of this warpgroup before this one: they complete in order, as bulk groups do."""
        sm, sim = agent.sm, agent.sim
        size = self.into.size_byte
        yield sim.at(sm.serve(sm.smem, sm.costs.smem(size)))
        yield sim.at(sm.serve(sm.link, agent.link_rate(size)) + sm.vary("memory", sm.memory.latency))
        yield sim.at(self._arrive(agent, size))
        if before and not before.ready():
            event = sim.event()
            before.subscribe(event)
            yield event
        if self.effect:
            self.effect()
        self.completion.done()

    def _arrive(self, agent: Agent, size: int) -> int:
        memory = agent.sm.memory
        return (memory.add if self.add else memory.write)(self.into.key, size)
