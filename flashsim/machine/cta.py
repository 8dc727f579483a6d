"""One CTA: the memory and barriers that its warpgroups share, and the work tiles it is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

from flashsim.engine import Barrier, Clock, PhaseWait, Simulation, TurnWait
from flashsim.engine import Turn as EngineTurn
from flashsim.errors import Deadlock, EndlessRun
from flashsim.machine.agent import Agent
from flashsim.machine.buffers import Buffer, Ring, View
from flashsim.machine.options import Options
from flashsim.machine.order import Order
from flashsim.machine.sm import SM
from flashsim.machine.tiles import Coordinates, Shortened, WorkTile
from flashsim.problem import AttentionProblem
from flashsim.schedules.base import Kernel
from flashsim.units import cycle_of, ticks


class CTA:
    """Interprets a kernel's text: every warpgroup's program runs as a process from the CTA's start on."""

    def __init__(
        self,
        sm: SM,
        kernel: Kernel,
        problem: AttentionProblem,
        next_tile: Callable[[], Coordinates | Shortened | None],
        on_exit: Callable[[CTA], None],
        options: Options,
    ) -> None:
        """`next_tile` gives the coordinates of the next work tile, or None."""
        self.sm = sm
        self.sim: Simulation = sm.sim
        self.kernel = kernel
        self.problem = problem
        self.tensors = options.tensors
        self.functional = options.tensors is not None
        self.rounded = options.rounded
        self.trace = options.trace
        self.hbm = options.hbm
        self._counters = options.counters
        self._next_tile = next_tile
        self._on_exit = on_exit
        self._tiles: list[WorkTile] = []
        self._exhausted = False
        self._items = 0
        self._busy_tiles = 0
        self._rings: list[Ring] = []
        self._syncs: list[Sync] = []
        self._turns: list[EngineTurn] = []
        self.head_dim, self.head_dim_v = kernel.widths(problem)
        self.shared = kernel.shared(self)
        self.agents = [Agent(self, role, index) for role in kernel.roles for index in range(role.count)]
        self.speaker = self.agents[0]
        """Whose program is running now: signals and waits are this warpgroup's."""
        self._running = len(self.agents)

    def start(self) -> None:
        """Start every warpgroup's program, after what a CTA costs to start."""
        begin = self.sim.now + ticks(self.sm.costs.device.launch.cta_clk)
        for agent in self.agents:
            self.sim.start(agent.steps(begin))

    def agent_done(self) -> None:
        """One warpgroup's program has ended."""
        self._running -= 1
        if self._running == 0:
            self._on_exit(self)

    def tile(self, index: int) -> WorkTile | None:
        """Work tile number `index` of this CTA, asking for a new one if nobody has come so far before."""
        if index == len(self._tiles) and not self._exhausted:
            where = self._next_tile()
            if where is None:
                self._exhausted = True
                return None
            k = self.kernel
            new = WorkTile(self.problem, k, where, self._busy_tiles, self._items)
            self._tiles.append(new)
            self._items += new.count
            self._busy_tiles += new.count > 0
        return self._tiles[index] if index < len(self._tiles) else None

    def sharers(self, tensor: str) -> int:
        """CTAs of a cluster that receive what one of them loads of a tensor."""
        return self.kernel.cluster if self.kernel.is_common(tensor) else 1

    def leftovers(self) -> list[str]:
        """What is wrong at the end: slots that still hold something, barriers in the wrong phase. Empty if
        all is well."""
        lines = [line for ring in self._rings for line in ring.leftovers()]
        lines += [line for agent in self.agents for line in agent.unfinished()]
        lines += [line for sync in self._syncs if (line := sync.barrier.leftover(sync.barrier.completed))]
        return lines + [line for turn in self._turns if (line := turn.leftover())]

    def waiting(self) -> tuple[str, ...]:
        """Who waits for what, and where in the text, one line each."""
        return tuple(
            f"{agent.name} waits for {agent.waits_for.describe()}, at {agent.where()}"
            for agent in self.agents
            if agent.waits_for
        )

    def standing(self) -> tuple[str, ...]:
        """Where everybody is in the text, one line each."""
        return tuple(f"{agent.name} is at {agent.where()}" for agent in self.agents if not agent.finished)

    # What a schedule declares (schedules.verbs.CTA).

    def ring(self, name: str, shape: tuple[int, int], stages: int, consumers: int, dtype: str | None = None) -> Ring:
        ring = Ring(self, name, shape, stages, consumers, dtype or self.problem.dtype)
        self._rings.append(ring)
        return ring

    def overlay(self, name: str, shape: tuple[int, int], consumers: int, over: Ring, dtype: str | None = None) -> Ring:
        ring = self.ring(name, shape, 1, consumers, dtype)
        for slot in over.slots:
            ring.slots[0].overlay(slot)
        return ring

    def slot(self, name: str, shape: tuple[int, int], dtype: str | None = None) -> View:
        return Buffer(name, shape, dtype or self.problem.dtype, "shared", self.functional).whole

    def sync(self, name: str, warpgroups: int) -> Sync:
        sync = Sync(self, name, warpgroups)
        self._syncs.append(sync)
        return sync

    def order(self, name: str, warpgroups: int) -> Order:
        assert self._counters is not None
        return Order(self, self._counters, name, warpgroups)

    def turn(self, name: str, warpgroups: int) -> Turn | NoTurn:
        if not warpgroups:
            return NoTurn()
        turn = Turn(self, name, warpgroups)
        self._turns.append(turn.turn)
        return turn


def run_to_end(sim: Simulation, running: Collection[CTA], max_events: int, watched: bool = True) -> None:
    """Run until all of `running` have left it.

    Raises Deadlock when nothing happens any more and somebody still waits, EndlessRun after `max_events`; both say
    where in the text every warpgroup stands.
    """
    try:
        sim.run(max_events, watched)
    except EndlessRun as error:
        raise EndlessRun("\n".join([f"{error}", *_by_cta(cta.standing() for cta in running)])) from None
    if running:
        lines = [f"deadlock in {cycle_of(sim.now)}", *_by_cta(cta.waiting() for cta in running)]
        raise Deadlock("\n".join(lines))


def _by_cta(lines: Iterable[tuple[str, ...]]) -> list[str]:
    """What is true of CTAs, and of how many of them."""
    found = []
    for same, ctas in Counter(lines).items():
        found += [f"in {ctas} CTAs:" if ctas > 1 else "in one CTA:", *(f"  {line}" for line in same)]
    return found


class Sync:
    """A barrier at which a number of warpgroups meet; who comes waits for the rest."""

    def __init__(self, cta: CTA, name: str, warpgroups: int) -> None:
        self.cta = cta
        self.barrier = Barrier(cta.sim, name, warpgroups)
        self._phase: dict[Agent, int] = {}

    def wait(self) -> PhaseWait:
        agent = self.cta.speaker
        phase = self._phase.get(agent, 0)
        self._phase[agent] = phase + 1
        agent.signal(self.barrier.arrive)
        return self.barrier.phase(phase, self.cta.sm.costs.cta_barrier)


class Turn:
    """The turn that is handed round among the warpgroups of one role."""

    def __init__(self, cta: CTA, name: str, warpgroups: int) -> None:
        self.cta = cta
        self.turn = EngineTurn(cta.sim, name, warpgroups)

    def wait(self) -> TurnWait:
        return self.turn.wait(self.cta.speaker.index, self.cta.sm.costs.named_barrier)

    def pass_on(self) -> None:
        agent = self.cta.speaker

        def pass_on(clock: Clock | None) -> None:
            self.turn.pass_on(agent.index, clock)

        agent.signal(pass_on)


class NoTurn:
    """For schedules without turns: everyone may always go."""

    delay = 0

    def wait(self) -> NoTurn:
        return self

    def pass_on(self) -> None:
        pass

    def ready(self) -> bool:
        return True

    def subscribe(self, event: Any) -> None:
        raise AssertionError("nobody waits for what is always ready")

    def knowledge(self) -> Clock | None:
        return None

    def describe(self) -> str:
        return "nothing"
