"""How to simulate, beside what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashsim.machine.sm import Draw


@dataclass(frozen=True)
class Options:
    """Settings of one run of a kernel."""

    private_memory: bool = False
    """Give every SM a memory of its own, in which every tile is in L2."""
    draw: Draw | None = None
    """Replaces every duration by another one."""
    seed: int = 0
    """Of the spread of the memory's latency."""
    max_events: int | None = None
    """Give up after so many."""
    tensors: dict[str, Any] | None = None
    """Numbers, float64 (batch, seqlen, heads, head_dim) by name: makes the run functional."""
    rounded: bool = False
    """In a functional run, round every tile that is written to its dtype."""
