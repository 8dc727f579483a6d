"""What processes wait for: barriers with phases, a turn that is handed round, and operations that end."""

from __future__ import annotations

from typing import Protocol

from flashsim.engine.causality import Clock, join
from flashsim.engine.simulation import Event, Simulation
from flashsim.errors import Hazard
from flashsim.units import cycle_of


class Wait(Protocol):
    """Something a process can wait for."""

    delay: int
    """Ticks that pass between the end of the wait and whatever comes next."""

    def ready(self) -> bool:
        """True if nobody has to wait (any more)."""

    def subscribe(self, event: Event) -> None:
        """Fire `event` when `ready` may have become true."""

    def knowledge(self) -> Clock | None:
        """What whoever waited comes to know; None where no clocks are kept."""

    def describe(self) -> str:
        """What is waited for, in words, for the message of a deadlock."""


class Barrier:
    """A barrier that completes a phase after `count` arrivals and then starts the next, as an mbarrier does.

    Waiting is by parity, as in `mbarrier.try_wait.parity`: a waiter for phase p goes on when the phase in progress has
    the other parity. A barrier that is lapped (completes two phases before somebody looks) therefore lets nobody pass.
    """

    __slots__ = ("_arriving", "_waiting", "clock", "completed", "count", "name", "pending", "sim")

    def __init__(self, sim: Simulation, name: str, count: int) -> None:
        self.sim = sim
        self.name = name
        self.count = count
        self.completed = 0
        self.pending = 0
        self.clock: Clock | None = None
        self._arriving: Clock = {}
        self._waiting: list[Event] = []

    def arrive(self, clock: Clock | None = None) -> bool:
        """One arrival; returns True if it completes the phase. The waiters come to know every arrival's clock."""
        self.pending += 1
        if clock is not None:
            join(self._arriving, clock)
        if self.pending < self.count:
            return False
        self.pending = 0
        self.completed += 1
        self.clock, self._arriving = self._arriving, {}
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self.sim.fire(event)
        return True

    def phase(self, phase: int, delay: int = 0) -> PhaseWait:
        """Wait until phase number `phase` (from 0) is complete; phase -1 is complete from the start."""
        return PhaseWait(self, phase, delay)

    def leftover(self, phases: int) -> str | None:
        """What is wrong with this barrier if it should now have completed `phases` phases; None if nothing is."""
        if self.pending:
            return f"{self.name}: {self.pending} of {self.count} arrivals in an unfinished phase at the end"
        if self.completed != phases:
            return f"{self.name}: {self.completed} phases completed at the end, {phases} expected"
        return None


class PhaseWait:
    """Waiting for one phase of a barrier."""

    __slots__ = ("barrier", "delay", "number")

    def __init__(self, barrier: Barrier, number: int, delay: int) -> None:
        self.barrier = barrier
        self.number = number
        self.delay = delay

    def ready(self) -> bool:
        return (self.barrier.completed ^ self.number) & 1 == 1

    def subscribe(self, event: Event) -> None:
        self.barrier._waiting.append(event)

    def knowledge(self) -> Clock | None:
        """Raises Hazard if the parity is right and the phase is not: the barrier was lapped."""
        b = self.barrier
        if b.completed != self.number + 1:
            raise Hazard(f"{b.name}: a wait for phase {self.number} passes when {b.completed} phases are complete")
        return b.clock

    def describe(self) -> str:
        b = self.barrier
        return f"phase {self.number} of {b.name} ({b.completed} completed, {b.pending} of {b.count} arrived)"


class Turn:
    """The right to go, handed round among `parties`: party 0 has it first, each passes it to the next.

    Hopper kernels build it from one named barrier per warpgroup (CUTLASS `OrderedSequenceBarrier`).
    """

    __slots__ = ("_waiting", "clock", "holder", "name", "parties", "sim", "taken")

    def __init__(self, sim: Simulation, name: str, parties: int) -> None:
        self.sim = sim
        self.name = name
        self.parties = parties
        self.holder = 0
        self.taken = False
        self.clock: Clock = {}
        self._waiting: list[Event] = []

    def wait(self, party: int, delay: int = 0) -> TurnWait:
        """Wait until it is the turn of `party`, and take it."""
        return TurnWait(self, party, delay)

    def pass_on(self, party: int, clock: Clock | None = None) -> None:
        """Hand the turn to the next party. Raises Hazard if `party` has not taken it."""
        if party != self.holder or not self.taken:
            now = cycle_of(self.sim.now)
            raise Hazard(f"{self.name}: party {party} passes a turn that it has not waited for, in {now}")
        self.holder = (party + 1) % self.parties
        self.taken = False
        if clock is not None:
            join(self.clock, clock)
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self.sim.fire(event)

    def leftover(self) -> str | None:
        """What is wrong with this turn at the end; None if nothing is."""
        return f"{self.name}: party {self.holder} still has the turn at the end" if self.taken else None


class TurnWait:
    """Waiting for one's turn. `knowledge` also takes the turn: it is asked for once, when the wait is over."""

    __slots__ = ("delay", "party", "turn")

    def __init__(self, turn: Turn, party: int, delay: int) -> None:
        self.turn = turn
        self.party = party
        self.delay = delay

    def ready(self) -> bool:
        return self.turn.holder == self.party and not self.turn.taken

    def subscribe(self, event: Event) -> None:
        self.turn._waiting.append(event)

    def knowledge(self) -> Clock | None:
        self.turn.taken = True
        return self.turn.clock

    def describe(self) -> str:
        state = "who has taken it" if self.turn.taken else "who has not come for it"
        return f"the turn of party {self.party} at {self.turn.name} (it is with party {self.turn.holder}, {state})"


class Completion:
    """The end of one operation. `done` is called once, at the tick at which the operation ends."""

    __slots__ = ("_waiting", "clock", "delay", "finished", "owner", "sim", "what")

    def __init__(self, sim: Simulation, what: object, clock: Clock | None = None) -> None:
        self.owner: object = None
        """Who alone can wait for it, if only one can."""
        self.delay = 0
        self.sim = sim
        self.what = what
        self.clock = clock
        self.finished = False
        self._waiting: list[Event] = []

    def done(self) -> None:
        """The operation has ended."""
        self.finished = True
        for event in self._waiting:
            self.sim.fire(event)
        self._waiting = []

    def ready(self) -> bool:
        return self.finished

    def subscribe(self, event: Event) -> None:
        self._waiting.append(event)

    def knowledge(self) -> Clock | None:
        return self.clock

    def describe(self) -> str:
        return f"the end of {self.what}"
