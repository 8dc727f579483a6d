"""One streaming multiprocessor: its units, and the rates at which they serve."""

from __future__ import annotations

from collections.abc import Callable

from flashsim.engine import Server, Simulation
from flashsim.machine.costs import Costs, Phase
from flashsim.machine.memory import Memory

UNITS = ("tensor", "exp", "fma", "alu", "pack", "smem", "tma", "issue", "link")

Draw = Callable[[str, int], int]
"""Replaces a duration: called with the unit and the ticks that it would take; used to try other latencies."""


class SM:
    """Timing assumption: every unit serves in order of arrival, one operation at a time: a wgmma group, the MMAs of one
    k-step or one LDSM of mma.sync, a quarter of a tile's exponentials, all of a tile's other instructions."""

    def __init__(self, sim: Simulation, costs: Costs, memory: Memory, draw: Draw | None = None) -> None:
        self.sim = sim
        self.costs = costs
        self.memory = memory
        self.draw = draw
        self.units = {name: Server(sim, name) for name in UNITS}
        self.tensor = self.units["tensor"]
        self.exp = self.units["exp"]
        self.smem = self.units["smem"]
        self.tma = self.units["tma"]
        self.link = self.units["link"]
        self.phases: dict[object, list[Phase]] = {}
        """Costs of the batches of register operations seen so far."""
        self.checked: set[object] = set()
        """Kinds of statements that have been found to fit their operands."""
        self.flop = 0
        """Of all products, each counted whole."""
        self.walks: list[list[int]] | None = None
        """If not None: for each warpgroup that has been here, when it started each KV tile."""

    def serve(self, unit: Server, duration: int) -> int:
        """Tick at which `unit` ends an operation of `duration` ticks that arrives now."""
        if self.draw:
            duration = self.draw(unit.name, duration)
        return unit.serve(duration)

    def vary(self, kind: str, duration: int) -> int:
        """`duration`, or what is drawn instead of it."""
        return self.draw(kind, duration) if self.draw else duration
