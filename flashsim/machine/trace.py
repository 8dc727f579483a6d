"""What the warpgroups of a functional run did to which slot, and when: for whoever asks how something came about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashsim.engine import PhaseWait, Wait
from flashsim.machine.buffers import View

if TYPE_CHECKING:
    from flashsim.machine.agent import Agent
    from flashsim.machine.cta import CTA


@dataclass
class Touch:
    """One operation, wait or signal."""

    cta: CTA
    who: str
    what: str
    uses: dict[str, str]
    """For each slot, what is done to it: `reads`, `writes`, `releases`, `waits`."""
    where: str
    """File and line of the schedule."""
    begin: int
    """Tick at which it was stated."""
    end: int | None = None
    """Tick at which it ended; None if it had not when the run ended."""


class Trace:
    """Everything that was done, in the order in which it was stated."""

    def __init__(self) -> None:
        self.touches: list[Touch] = []

    def note(self, agent: Agent, who: str, what: str, uses: dict[str, str], end: int | None = None) -> Touch:
        """Add what `agent` states now."""
        touch = Touch(agent.cta, who, what, uses, agent.where(), agent.sim.now, end)
        self.touches.append(touch)
        return touch

    def __bool__(self) -> bool:
        return True

    def of_slots(self, cta: CTA, names: Iterable[str]) -> list[Touch]:
        """What was done to any of these slots of one CTA."""
        wanted = set(names)
        return [touch for touch in self.touches if touch.cta is cta and wanted & touch.uses.keys()]


def slots_awaited(wait: Wait) -> dict[str, str]:
    """The slots that somebody waits for: those of a ring's barrier, or those that an operation uses."""
    if isinstance(wait, PhaseWait):
        return {wait.barrier.name.rpartition(".")[0]: "waits"}
    parts = getattr(getattr(wait, "what", None), "parts", ())
    return {part.buffer.name: "waits" for part in parts if isinstance(part, View)}
