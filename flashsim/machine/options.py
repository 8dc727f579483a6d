"""How to simulate, beside what."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from flashsim.machine.memory import Key
from flashsim.machine.order import Counters
from flashsim.machine.shared_hbm import SharedHbm
from flashsim.machine.sm import Draw
from flashsim.machine.trace import Trace

EVENTS_PER_KV_TILE = 5_000
"""More than this is a schedule that does not end: the most wasteful tile of the built-in ones takes a tenth of it."""


@dataclass(frozen=True)
class Options:
    """Settings of one run of a kernel."""

    private_memory: bool = False
    """Give every SM a memory of its own, in which every tile is in L2."""
    draw: Draw | None = None
    """Replaces every duration by another one."""
    seed: int = 0
    """Of the spread of the memory's latency."""
    tensors: dict[str, Any] | None = None
    """Numbers, float64 (batch, seqlen, heads, head_dim) by name: makes the run functional."""
    rounded: bool = False
    """In a functional run, round every tile that is written to its dtype."""
    hbm: SharedHbm | None = None
    """In a functional run, the accesses to HBM of one kernel."""
    l2: dict[str, OrderedDict[Key, tuple[int, int, bool]]] | None = None
    """What L2 holds after a kernel, by its name, for launches of one kernel that follow each other; None: nothing."""
    counters: Counters | None = None
    """By which the CTAs of one kernel take turns."""
    trace: Trace | None = None
    """In a functional run, note here what everybody does."""

    def held_by(self, kernel: str) -> OrderedDict[Key, tuple[int, int, bool]] | None:
        """What L2 holds since the last launch of a kernel of this name."""
        return None if self.l2 is None else self.l2.setdefault(kernel, OrderedDict())
