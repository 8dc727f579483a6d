"""The operations that collide, as lines of text with bars."""

from __future__ import annotations

from flashsim.engine import Memory
from flashsim.machine.trace import Touch, Trace
from flashsim.units import TICKS_PER_CLK

LINES = 12
WIDTH = 32
"""Characters of the longest bar."""


def timeline(trace: Trace, memory: object) -> list[str]:
    """The last that was done to `memory`, and to what lies at its addresses; if none is named, the last of all.

    One line each: first and last cycle, who, what it does to the memory, the operation, file and line, and a bar.
    """
    if isinstance(memory, Memory):
        names = {memory.name, *(alias.name for alias in memory.aliases)}
        touches = trace.of_slots(trace.touches[-1].cta, names)[-LINES:]
    else:
        names = set()
        touches = [
            touch for touch in trace.touches if not touch.what.startswith(("map(", "reduce(", "waits for nothing"))
        ][-LINES:]
    if not touches:
        return []
    first = min(touch.begin for touch in touches)
    last = max(max(touch.begin, touch.end or 0) for touch in touches)
    rows = [[*_columns(touch, names), _bar(touch, first, last)] for touch in touches]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _columns(touch: Touch, names: set[str]) -> list[str]:
    begin, end = (None if tick is None else f"{tick / TICKS_PER_CLK:.0f}" for tick in (touch.begin, touch.end))
    used = ", ".join(f"{how} {slot}" for slot, how in touch.uses.items() if slot in names)
    line = touch.where.replace("\\", "/").rpartition("/")[2]
    return [f"{begin} to {end or '...'}", touch.who, used, touch.what, line]


def _bar(touch: Touch, first: int, last: int) -> str:
    """From its beginning to its end, at a place of its own; an arrow where it had not ended."""
    scale = WIDTH / max(1, last - first)
    start = round((touch.begin - first) * scale)
    if touch.end is None:
        return " " * start + "=" * max(1, WIDTH - start) + ">"
    return " " * start + "=" * max(1, round((touch.end - first) * scale) - start)
