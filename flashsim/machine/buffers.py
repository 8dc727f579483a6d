"""Memory that a schedule names: tiles in shared memory and registers, rings of slots, and views of them.

In a timing run a buffer is a shape. In a functional run it also holds numbers, NaN wherever nothing valid is, and a
record of who touched it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashsim.engine import Barrier, Memory, PhaseWait
from flashsim.errors import Hazard

if TYPE_CHECKING:
    from flashsim.machine.cta import CTA

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def check_rows(start: int, count: int, rows: int) -> None:
    """Raises IndexError unless [start, start + count) are some of the `rows` of a tile."""
    if start < 0 or count < 1 or start + count > rows:
        raise IndexError(f"rows {start} to {start + count - 1} of a tile that has rows 0 to {rows - 1}")


class Buffer:
    """One tile of memory: `shape` elements of `dtype` at a `place`."""

    __slots__ = (
        "aliases",
        "array",
        "dtype",
        "empty_because",
        "memory",
        "name",
        "place",
        "ring",
        "shape",
        "slot",
        "transposed",
        "whole",
    )

    def __init__(self, name: str, shape: tuple[int, int], dtype: str, place: str, functional: bool) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.place = place
        self.ring: Ring | None = None
        self.slot = 0
        self.memory = Memory(name) if functional else None
        self.aliases: list[Buffer] = []
        """Other buffers at the same addresses."""
        self.array: Any = None
        self.empty_because = "nothing has been written to it"
        if functional:
            self.poison(self.empty_because)
        self.whole = View(self, 0, shape[0], False)
        self.transposed = View(self, 0, shape[0], True)

    @property
    def size_byte(self) -> int:
        return self.shape[0] * self.shape[1] * ELEMENT_BYTES[self.dtype]

    def overlay(self, other: Buffer) -> None:
        """Let this buffer lie at the addresses of `other`: a write to one destroys what is in the other."""
        self.aliases.append(other)
        other.aliases.append(self)
        if self.memory and other.memory:
            self.memory.aliases.append(other.memory)
            other.memory.aliases.append(self.memory)

    def poison(self, because: str) -> None:
        """Nothing here is valid any more."""
        import numpy as np

        self.array = np.full(self.shape, np.nan)
        self.empty_because = because

    def holds_something(self) -> bool:
        """True if numbers are in it that nobody has released; known in a functional run only."""
        import numpy as np

        return self.memory is not None and not bool(np.isnan(self.array).all())


class View:
    """Some rows of a buffer, perhaps transposed: what verbs take."""

    __slots__ = ("buffer", "count", "dtype", "flipped", "place", "shape", "start")

    def __init__(self, buffer: Buffer, start: int, count: int, flipped: bool) -> None:
        self.buffer = buffer
        self.start = start
        self.count = count
        self.flipped = flipped
        columns = buffer.shape[1]
        self.shape = (columns, count) if flipped else (count, columns)
        self.dtype = buffer.dtype
        self.place = buffer.place

    @property
    def T(self) -> View:  # noqa: N802
        if self.count == self.buffer.shape[0]:
            return self.buffer.whole if self.flipped else self.buffer.transposed
        return View(self.buffer, self.start, self.count, not self.flipped)

    def rows(self, start: int, count: int) -> View:
        check_rows(start, count, self.count)
        if start == 0 and count == self.count:
            return self
        return View(self.buffer, self.start + start, count, self.flipped)

    @property
    def span(self) -> tuple[int, int]:
        """The buffer's rows that this view covers."""
        return self.start, self.start + self.count

    @property
    def size_byte(self) -> int:
        return self.shape[0] * self.shape[1] * ELEMENT_BYTES[self.dtype]

    def numbers(self) -> Any:
        """The numbers as they are now. Raises Hazard if some were never written, or belong to a released item."""
        import numpy as np

        array = self.buffer.array[self.start : self.start + self.count]
        if np.isnan(array).any():
            raise Hazard(f"{self} is read, but {self.buffer.empty_because}", memory=self.buffer.memory)
        return array.T if self.flipped else array

    def assign(self, array: Any) -> None:
        """Overwrite the numbers."""
        for other in self.buffer.aliases:
            other.poison(f"{self.buffer.name} was written over it")
        self.buffer.array[self.start : self.start + self.count] = array
        self.buffer.empty_because = "part of what was last written to it is not a number"

    def __str__(self) -> str:
        if self.count == self.buffer.shape[0]:
            return self.buffer.name
        return f"{self.buffer.name} rows {self.start} to {self.start + self.count - 1}"


class Ring:
    """Slots in shared memory with a full and an empty mbarrier each; item j lives in slot j mod stages, phase j
    // stages."""

    def __init__(self, cta: CTA, name: str, shape: tuple[int, int], stages: int, consumers: int, dtype: str) -> None:
        self.cta = cta
        self.name = name
        self.stages = stages
        names = [f"{name}[{i}]" if stages > 1 else name for i in range(stages)]
        self.slots = [Buffer(n, shape, dtype, "shared", cta.functional) for n in names]
        for index, slot in enumerate(self.slots):
            slot.ring, slot.slot = self, index
        self._full = [Barrier(cta.sim, f"{n}.full", 1) for n in names]
        self._empty = [Barrier(cta.sim, f"{n}.empty", consumers) for n in names]

    def __getitem__(self, j: int) -> View:
        return self.slots[j % self.stages].whole

    def full(self, j: int) -> PhaseWait:
        return self._full[j % self.stages].phase(j // self.stages)

    def empty(self, j: int) -> PhaseWait:
        return self._empty[j % self.stages].phase(j // self.stages - 1, self.cta.sm.costs.mbarrier)

    def release(self, j: int) -> None:
        slot, speaker = j % self.stages, self.cta.speaker
        if self.cta.trace:
            name = self.slots[slot].name
            self.cta.trace.note(speaker, speaker.name, f"release of {name}", {name: "releases"}, speaker.sim.now)
        speaker.signal(lambda clock: self._release(slot, clock))

    def _release(self, slot: int, clock: Any) -> None:
        if self._empty[slot].arrive(clock) and self.cta.functional:
            self.slots[slot].poison("every consumer has released what was in it")

    def landed(self, slot: int, clock: Any) -> None:
        """A load into `slot` has ended."""
        self._full[slot].arrive(clock)

    def leftovers(self) -> list[str]:
        """What is wrong with this ring after a run: items left in a slot, unfinished phases. Empty if all is well."""
        lines = []
        for slot, full, empty in zip(self.slots, self._full, self._empty, strict=True):
            loaded = full.completed
            if loaded > empty.completed or (not loaded and slot.holds_something()):
                released = f"{empty.pending} of {empty.count} consumers have released it"
                lines.append(f"{slot.name} still holds an item at the end: {released}")
            elif wrong := empty.leftover(loaded or empty.completed):
                lines.append(wrong)
        return lines
