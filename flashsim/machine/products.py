"""Matrix products: wgmma, which runs beside its warpgroup, and mma.sync, which holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashsim.engine import Completion, Steps
from flashsim.errors import SimulationError
from flashsim.machine.buffers import View
from flashsim.machine.operations import Effect
from flashsim.schedules.tensors import WIDTHS

if TYPE_CHECKING:
    from flashsim.machine.agent import Agent
    from flashsim.machine.sm import SM


class Product:
    """A product of two tiles."""

    __slots__ = ("a", "b", "completion", "effect", "into")

    def __init__(self, a: View, b: View, into: View, completion: Completion, effect: Effect) -> None:
        self.a = a
        self.b = b
        self.into = into
        self.completion = completion
        self.effect = effect

    def _count(self, sm: SM) -> None:
        sm.flop += 2 * self.a.shape[0] * self.a.shape[1] * self.b.shape[1]

    def _end(self) -> None:
        if self.effect:
            self.effect()
        self.completion.done()


class AsyncProduct(Product):
    """A product by wgmma.

    Timing assumption: the tensor cores take products in order of arrival, each whole; issue blocks until the last
    instruction of the product has been taken, and the result is there `drain_clk` later. A product that follows another
    of the same warpgroup finds the pipe filled; the first one pays `fill_clk` (Luo et al., arXiv 2501.12084, and the
    group completion times quoted in the device file).
    """

    def __init__(self, a: View, b: View, into: View, completion: Completion, effect: Effect) -> None:
        if b.place != "shared":
            raise SimulationError(f"gemm by wgmma reads its second operand from shared memory, got {b} ({b.place})")
        super().__init__(a, b, into, completion, effect)

    def perform(self, agent: Agent) -> Steps:
        sm, sim = agent.sm, agent.sim
        self._count(sm)
        k_byte = self.a.shape[1] * WIDTHS[self.a.dtype]
        duration, read = sm.costs.wgmma(self.a.shape[0], self.b.shape[1], k_byte, self.a.place == "shared")
        if sim.now >= agent.products_end:
            yield sim.at(sim.now + sm.vary("fill", sm.costs.wgmma_fill))
        accepted = sm.serve(sm.tensor, duration)
        # The operands' reads are part of the issue interval; they are counted, and do not hold up others.
        sm.smem.busy += sm.costs.smem(read)
        yield sim.at(accepted)
        # Products of a warpgroup complete in order of issue.
        agent.products_end = max(agent.products_end, sim.now + sm.vary("drain", sm.costs.wgmma_drain))
        sim.call(agent.products_end, self._end)


class SyncProduct(Product):
    """A product by mma.sync; those of its operands that are not in registers are fetched by LDSM.

    Timing assumption: in each warp, the LDSMs of step k + 1 stand before the MMAs of step k in program order and each
    holds the warp until the port has served it, so port and tensor time add; they overlap with those of other warps
    only. The port serves one LDSM of four warps at a time and the tensor cores the MMAs of one step, first come, first
    served: with one request of each warp outstanding that is round robin.
    """

    def perform(self, agent: Agent) -> Steps:
        sm, sim, costs = agent.sm, agent.sim, agent.sm.costs
        self._count(sm)
        m, k, n = *self.a.shape, self.b.shape[1]
        in_shared = self.a.place == "shared", self.b.place == "shared"
        steps, mma, requests, ldsm = costs.mma_sync(m, n, k, in_shared, self.into.buffer.warps)
        for step in range(steps + 1):
            fragments = sim.now  # of step - 1, whose LDSMs were the last to be served
            if step < steps:
                for _ in range(requests):
                    yield sim.at(sm.serve(sm.smem, ldsm))
            if step > 0:
                there = fragments + sm.vary("latency", costs.smem_latency if requests else 0)
                if there > sim.now:
                    yield sim.at(there)
                yield sim.at(sm.serve(sm.tensor, mma))
        yield sim.at(sim.now + sm.vary("latency", costs.mma_latency))
        self._end()
