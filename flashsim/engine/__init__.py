"""Discrete events: time, units that serve, barriers, and what happened before what. Knows no GPU and no attention."""

from flashsim.engine.barrier import Barrier, Completion, PhaseWait, Turn, TurnWait, Wait
from flashsim.engine.causality import Access, Clock, Memory, Part, Timeline, join
from flashsim.engine.semaphore import Semaphore, SemaphoreWait
from flashsim.engine.server import Server
from flashsim.engine.simulation import Event, Simulation, Steps

__all__ = [
    "Access",
    "Barrier",
    "Clock",
    "Completion",
    "Event",
    "Memory",
    "Part",
    "PhaseWait",
    "Semaphore",
    "SemaphoreWait",
    "Server",
    "Simulation",
    "Steps",
    "Timeline",
    "Turn",
    "TurnWait",
    "Wait",
    "join",
]
