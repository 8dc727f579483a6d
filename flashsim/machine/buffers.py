"""Memory that a schedule names: tiles in shared memory and registers, rings of slots, and views of them.

In a timing run a buffer is a shape. In a functional run it also holds numbers, NaN wherever nothing valid is, and a
record of who touched it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashsim.engine import Barrier, Memory, PhaseWait
from flashsim.errors import Hazard
from flashsim.schedules.tensors import WIDTHS

if TYPE_CHECKING:
    from flashsim.machine.cta import CTA

FOUR_BY_ONE = (4, 1)
"""Layout of the warps of a warpgroup over a tile, (along rows, along columns): each has its own rows."""


def check_range(what: str, start: int, count: int, length: int) -> None:
    """Raises IndexError unless [start, start + count) are some of the rows, or columns, of a tile that has `length`."""
    if start < 0 or count < 1 or start + count > length:
        raise IndexError(f"{what} {start} to {start + count - 1} of a tile that has {what} 0 to {length - 1}")


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
        "warps",
        "whole",
    )

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: str,
        place: str,
        functional: bool,
        warps: tuple[int, int] = FOUR_BY_ONE,
    ) -> None:
        self.name = name
        self.warps = warps
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
        everything = ((0, shape[0]), (0, shape[1]))
        self.whole = View(self, everything, False)
        self.transposed = View(self, everything, True)

    @property
    def size_byte(self) -> int:
        return self.shape[0] * self.shape[1] * WIDTHS[self.dtype]

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
    """Some rows and columns of a buffer, perhaps transposed: what verbs take."""

    __slots__ = ("buffer", "dtype", "flipped", "part", "place", "shape")

    def __init__(self, buffer: Buffer, part: tuple[tuple[int, int], tuple[int, int]], flipped: bool) -> None:
        """`part` is of the buffer: its rows, and its columns, from where to where."""
        self.buffer = buffer
        self.part = part
        self.flipped = flipped
        (top, bottom), (left, right) = part
        self.shape = (right - left, bottom - top) if flipped else (bottom - top, right - left)
        self.dtype = buffer.dtype
        self.place = buffer.place

    @property
    def T(self) -> View:  # noqa: N802
        if self.is_whole:
            return self.buffer.whole if self.flipped else self.buffer.transposed
        return View(self.buffer, self.part, not self.flipped)

    @property
    def is_whole(self) -> bool:
        return self.part == self.buffer.whole.part

    def rows(self, start: int, count: int) -> View:
        check_range("rows", start, count, self.shape[0])
        return self._narrowed(int(self.flipped), start, count)

    def columns(self, start: int, count: int) -> View:
        check_range("columns", start, count, self.shape[1])
        return self._narrowed(1 - int(self.flipped), start, count)

    def _narrowed(self, axis: int, start: int, count: int) -> View:
        """Only [start, start + count) along one axis of the buffer."""
        begin = self.part[axis][0] + start
        if (begin, begin + count) == self.part[axis]:
            return self
        rows, columns = ((begin, begin + count) if n == axis else span for n, span in enumerate(self.part))
        return View(self.buffer, (rows, columns), self.flipped)

    @property
    def size_byte(self) -> int:
        return self.shape[0] * self.shape[1] * WIDTHS[self.dtype]

    def _numbers(self) -> Any:
        rows, columns = self.part
        return self.buffer.array[slice(*rows), slice(*columns)]

    def numbers(self) -> Any:
        """The numbers as they are now. Raises Hazard if some were never written, or belong to a released item."""
        import numpy as np

        array = self._numbers()
        if np.isnan(array).any():
            raise Hazard(f"{self} is read, but {self.buffer.empty_because}", memory=self.buffer.memory)
        return array.T if self.flipped else array

    def assign(self, array: Any) -> None:
        """Overwrite the numbers."""
        for other in self.buffer.aliases:
            other.poison(f"{self.buffer.name} was written over it")
        self._numbers()[...] = array.T if self.flipped else array
        self.buffer.empty_because = "part of what was last written to it is not a number"

    def __str__(self) -> str:
        parts = [
            f"{what} {begin} to {end - 1}"
            for what, (begin, end), length in zip(("rows", "columns"), self.part, self.buffer.shape, strict=True)
            if end - begin < length
        ]
        return " ".join([self.buffer.name, " and ".join(parts)]).rstrip()


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

    def commit(self, j: int) -> None:
        slot, speaker = j % self.stages, self.cta.speaker
        if self.cta.trace:
            name = self.slots[slot].name
            self.cta.trace.note(speaker, speaker.name, f"commit of {name}", {name: "commits"}, speaker.sim.now)
        speaker.signal(lambda clock: self._full[slot].arrive(clock))

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
