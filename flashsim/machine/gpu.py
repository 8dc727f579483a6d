"""The whole GPU: every SM and every CTA of a kernel in one simulation. Nothing is skipped and nothing is assumed
alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flashsim.devices import DeviceSpec
from flashsim.engine import Simulation
from flashsim.errors import Hazard
from flashsim.machine.costs import Costs
from flashsim.machine.cta import CTA, run_to_end
from flashsim.machine.feasibility import fit
from flashsim.machine.grid import WorkTiles
from flashsim.machine.memory import PrivateMemory, SharedMemory
from flashsim.machine.options import EVENTS_PER_KV_TILE, Options
from flashsim.machine.order import SharedCounters
from flashsim.machine.shared_hbm import SharedHbm
from flashsim.machine.sm import SM, UNITS
from flashsim.machine.tiles import Coordinates
from flashsim.problem import AttentionProblem, num_k_tiles, num_q_tiles
from flashsim.schedules.base import Kernel


def event_limit(kernel: Kernel, problem: AttentionProblem) -> int:
    """Events that no run of `kernel` takes that comes to its end."""
    q_tiles, kv_tiles = num_q_tiles(problem, kernel.BLOCK_M), num_k_tiles(problem, kernel.BLOCK_N)
    splits = kernel.grid.splits or 1
    return EVENTS_PER_KV_TILE * (1 + q_tiles) * (1 + kv_tiles) * splits * problem.heads_q * problem.batch


def _allocate(tensors: dict[str, Any], kernel: Kernel, problem: AttentionProblem) -> None:
    """Add the kernel's workspace to the tensors of a functional run, full of NaN, unless a kernel before it has."""
    import numpy as np

    for name, tensor in kernel.workspace.items():
        splits = (kernel.grid.splits,) if tensor.splits and kernel.grid.splits else ()
        if name not in tensors:
            tensors[name] = np.full((*splits, *tensor.shape(problem)), np.nan)


@dataclass
class KernelRun:
    """What one launch did. Ticks of `busy` and `active` are summed over the SMs."""

    ticks: int
    """From the launch's arrival at the GPU to the last CTA's end."""
    launch: int
    """Of these, until the first CTA starts."""
    active: int
    """Ticks in which an SM had a CTA."""
    flop: int
    """Of all products, each tile counted whole."""
    busy: dict[str, int]
    read_byte: Mapping[str, int]
    """By tensor."""
    written_byte: Mapping[str, int]
    events: int
    ctas_per_sm: int
    order_matters: frozenset[str] = frozenset()
    """Tensors to which CTAs have added in an order that depends on time; known after a functional run."""


@dataclass
class _Sm:
    sm: SM
    resident: int = 0
    since: int = 0
    active: int = 0


@dataclass
class FullSimulation:
    """One kernel on a device.

    Timing assumption: after the launch, CTAs start one after the other, `cta_interval_ns` apart, first one on each SM,
    then a second one, and so on while they fit; then each CTA that ends makes room for the next.
    """

    device: DeviceSpec
    clock_mhz: float
    kernel: Kernel
    problem: AttentionProblem
    options: Options = field(default_factory=Options)

    def run(self) -> KernelRun:
        """Simulate. Raises Deadlock, Race or Hazard if the schedule is wrong, Infeasible if it does not fit."""
        o, k = replace(self.options, hbm=SharedHbm()), self.kernel
        if o.tensors is not None:
            _allocate(o.tensors, k, self.problem)
        per_sm = fit(k, self.problem, self.device).ctas_per_sm
        sim = self._sim = Simulation()
        o = replace(o, counters=SharedCounters(sim))
        costs = Costs(self.device, self.clock_mhz)
        tma = k.copy == "tma"
        shared = SharedMemory(sim, costs, tma, o.seed, o.held_by(k.name))
        private = PrivateMemory(sim, costs, tma, k.is_common)
        memory = private if o.private_memory else shared
        self._settings = o
        self._sms = [_Sm(SM(sim, costs, memory, o.draw)) for _ in range(self.device.sm.count)]
        self._running: dict[CTA, _Sm] = {}
        self._ended: list[CTA] = []
        launch = costs.ns(self.device.launch.kernel_us * 1000)
        interval = costs.ns(self.device.launch.cta_interval_ns)
        grid = self._grid = WorkTiles(k, self.problem, slots=len(self._sms) * per_sm)
        for slot in range(min(grid.slots, grid.count)):
            sim.start(self._start(self._sms[slot % len(self._sms)], launch + slot * interval, grid.of_slot(slot)))
        run_to_end(sim, self._running, event_limit(k, self.problem))
        if wrong := [line for cta in self._ended for line in cta.leftovers()]:
            raise Hazard("\n".join(wrong))
        busy = {name: sum(s.sm.units[name].busy for s in self._sms) for name in UNITS}
        busy |= {"l2": shared.l2.busy_until(self._end), "hbm": shared.hbm.busy_until(self._end)}
        return KernelRun(
            ticks=self._end,
            launch=launch,
            active=sum(s.active for s in self._sms),
            flop=sum(s.sm.flop for s in self._sms),
            busy=busy,
            read_byte=shared.read_byte,
            written_byte=shared.written_byte,
            events=sim.events,
            ctas_per_sm=per_sm,
            order_matters=frozenset(o.hbm.order_matters if o.hbm else ()),
        )

    def _start(self, host: _Sm, at: int, source: Iterator[Coordinates]) -> Any:
        """Start a CTA on `host` at tick `at`."""
        sim = self._sim
        yield sim.at(at)
        if self._grid.many_ctas:
            source = iter(first := self._grid.of_next_cta())
            if not first:
                return
        if host.resident == 0:
            host.since = sim.now
        host.resident += 1
        cta = CTA(host.sm, self.kernel, self.problem, lambda: next(source, None), self._exit, self._settings)
        self._running[cta] = host
        cta.start()

    def _exit(self, cta: CTA) -> None:
        host = self._running.pop(cta)
        if cta.functional:
            self._ended.append(cta)
        host.resident -= 1
        self._end = self._sim.now
        if host.resident == 0:
            host.active += self._sim.now - host.since
        if self._grid.many_ctas and self._grid.left:
            self._sim.start(self._start(host, self._sim.now, iter(())))
