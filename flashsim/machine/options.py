"""How to simulate, beside what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    trace: Trace | None = None
    """In a functional run, note here what everybody does."""
