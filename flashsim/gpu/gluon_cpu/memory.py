"""Shared memory of a CTA: allocations, views of them, mbarriers; who touched which bytes, and what orders that."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from flashsim.engine import Access, Clock, Memory, Part, Timeline, join
from flashsim.errors import Hazard, Race
from flashsim.gpu.gluon_cpu.scheduler import Scheduler, source_line
from flashsim.gpu.gluon_cpu.tensors import TORCH, Tensor, width
from flashsim.units import TICKS_PER_CLK

Span = tuple[int, int]
"""From where to where, in bytes of an allocation."""


class Allocation:
    """Some bytes of shared memory. What has never been written is NaN."""

    def __init__(self, scheduler: Scheduler, elements: int, dtype: Any) -> None:
        self.scheduler = scheduler
        self.bytes = torch.full((elements,), _poison(dtype), dtype=TORCH[str(dtype)]).view(torch.uint8)
        self.memory = Memory("shared memory")
        self.unfenced: list[tuple[Span, Timeline, int, str]] = []
        """Bytes that ordinary stores wrote: the fence after them has this number on this timeline."""
        self.loads: dict[Span, Timeline] = {}
        """A timeline for the TMA loads into each place, which end in any order."""

    def read(self, view: SharedView, on: Timeline, count: int, clock: Clock, what: str, asynchronous: bool) -> None:
        """Note a read. Raises Race, and Hazard where nothing was ever written."""
        for span in view.spans:
            self._fenced(span, clock, what, asynchronous)
            access = self._access(on, count, span, f"{what} of {view.name}")
            self.memory.name = view.name
            if not any(_overlap(span, write.part[0]) for write in self.memory.writes):
                raise Hazard(f"{source_line()}: {what} of {view.name}, to which nothing has been written")
            self.memory.read(access, clock)

    def write(self, view: SharedView, on: Timeline, count: int, clock: Clock, what: str, asynchronous: bool) -> None:
        """Note a write. Raises Race."""
        for span in view.spans:
            self._fenced(span, clock, what, asynchronous)
            self.memory.name = view.name
            self.memory.write(self._access(on, count, span, f"{what} of {view.name}"), clock)
            self.unfenced = [entry for entry in self.unfenced if not _covers(span, entry[0])]

    def stored(self, view: SharedView, fences: Timeline, what: str) -> None:
        """Ordinary stores have written here, and need a fence before asynchronous operations touch it."""
        self.unfenced += [(span, fences, fences.count + 1, what) for span in view.spans]

    def _access(self, on: Timeline, count: int, span: Span, what: str) -> Access:
        part: Part = (span,)
        line = source_line()
        return Access(on, count, part, f"{what} ({line})" if line else what, self.scheduler.steps * TICKS_PER_CLK)

    def _fenced(self, span: Span, clock: Clock, what: str, asynchronous: bool) -> None:
        if not asynchronous:
            return
        for other, fences, number, store in self.unfenced:
            if _overlap(span, other) and clock.get(fences, 0) < number:
                raise Race(
                    f"{source_line()}: {what} of what {store} wrote: it is asynchronous, and no fence_async_shared "
                    f"after that store is known to it",
                    memory=self.memory,
                )


def _overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _covers(outer: Span, inner: Span) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _poison(dtype: Any) -> float:
    x = TORCH[str(dtype)]
    return math.nan if x.is_floating_point else torch.iinfo(x).max


class SharedView:
    """Stands in for `shared_memory_descriptor`: a view of an allocation."""

    def __init__(self, allocation: Allocation, data: torch.Tensor, dtype: Any, layout: Any, name: str) -> None:
        self.allocation = allocation
        self.data = data
        self.dtype = dtype
        self.layout = layout
        self.name = name
        self._spans: list[Span] | None = None

    @classmethod
    def allocate(cls, scheduler: Scheduler, dtype: Any, shape: Sequence[int], layout: Any, name: str) -> SharedView:
        allocation = Allocation(scheduler, math.prod(shape), dtype)
        return cls(allocation, allocation.bytes.view(TORCH[str(dtype)]).view(*shape), dtype, layout, name)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def rank(self) -> int:
        rank: int = self.data.ndim
        return rank

    @property
    def numel(self) -> int:
        count: int = self.data.numel()
        return count

    @property
    def nbytes_per_cta(self) -> int:
        return self.numel * width(self.dtype)

    @property
    def spans(self) -> list[Span]:
        """The bytes of the allocation that this view has, in pieces without gaps."""
        if self._spans is None:
            size, each = width(self.dtype), 1
            axes = sorted(zip(self.data.stride(), self.data.shape, strict=True))
            while axes and (axes[0][0] == each or axes[0][1] == 1):
                each *= axes.pop(0)[1]
            start = self.data.storage_offset()
            offsets = itertools.product(*[range(0, stride * count, stride) for stride, count in axes])
            starts = sorted(start + sum(offset) for offset in offsets)
            self._spans = [(size * first, size * (first + each)) for first in starts]
        return self._spans

    def _derived(self, data: torch.Tensor, suffix: str = "") -> SharedView:
        return SharedView(self.allocation, data, self.dtype, self.layout, self.name + suffix)

    def index(self, index: int) -> SharedView:
        if not 0 <= index < self.data.shape[0]:
            raise Hazard(f"{source_line()}: {self.name} has {self.data.shape[0]} slots, slot {index} is none of them")
        return self._derived(self.data[int(index)], f"[{int(index)}]")

    def slice(self, start: int, length: int, dim: int = 0) -> SharedView:
        if start < 0 or start + length > self.data.shape[dim]:
            raise Hazard(f"{source_line()}: {start} to {start + length - 1} of {self.data.shape[dim]} in {self.name}")
        return self._derived(self.data.narrow(dim, int(start), int(length)), f"[{int(start)}:{int(start + length)}]")

    def permute(self, order: Sequence[int]) -> SharedView:
        return self._derived(self.data.permute(*order))

    def reshape(self, shape: Sequence[int]) -> SharedView:
        return self._derived(self.data.view(*shape))

    def reinterpret(self, dtype: Any = None, shape: Any = None, layout: Any = None) -> SharedView:
        dtype, shape = dtype or self.dtype, shape or self.shape
        first = self.data.storage_offset() * width(self.dtype)
        data = self.allocation.bytes[first : first + math.prod(shape) * width(dtype)].view(TORCH[str(dtype)])
        return SharedView(self.allocation, data.view(*shape), dtype, layout or self.layout, self.name)

    _reinterpret = reinterpret

    def load(self, layout: Any = None) -> Tensor:
        scheduler = self.allocation.scheduler
        scheduler.pause()
        me = scheduler.me()
        self.allocation.read(self, me.timeline, me.timeline.step(), me.clock, "a load", asynchronous=False)
        return Tensor(self.data.clone())

    def store(self, value: Tensor) -> None:
        if list(value.data.shape) != self.shape or value.data.dtype != self.data.dtype:
            raise TypeError(
                f"{self.name} is {self.dtype} {self.shape}, what is stored is {value.data.dtype} {value.shape}"
            )
        scheduler = self.allocation.scheduler
        scheduler.pause()
        me = scheduler.me()
        self.allocation.write(self, me.timeline, me.timeline.step(), me.clock, "a store", asynchronous=False)
        self.allocation.stored(self, me.fences, f"the store of {me.name} ({source_line()})")
        self.data.copy_(value.data)

    def _keep_alive(self) -> None:
        pass


class Barrier:
    """An mbarrier: a phase is complete after `count` arrivals and when no bytes are outstanding."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self.scheduler = scheduler
        self.name = name
        self.count = 0
        self.pending = 0
        self.bytes = 0
        self.completed = 0
        self.clock: Clock = {}
        """What the arrivals of the phase that was completed last knew."""
        self._arriving: Clock = {}

    def init(self, count: int) -> None:
        if self.count:
            raise Hazard(f"{source_line()}: {self.name} is initialized a second time")
        if count < 1:
            raise Hazard(f"{source_line()}: {self.name} is initialized for {count} arrivals, must be at least 1")
        self.count = self.pending = int(count)

    def invalidate(self) -> None:
        self._initialized()
        self.count = 0

    def arrive(self, count: int, expected_bytes: int = 0) -> None:
        self._initialized()
        if count > self.pending:
            raise Hazard(
                f"{source_line()}: {self.scheduler.me().name} arrives {int(count)} times at {self.name}, of whose "
                f"phase {self.completed} {self.count - self.pending} of {self.count} have arrived"
            )
        join(self._arriving, self.scheduler.me().tell())
        self.pending -= int(count)
        self.bytes += int(expected_bytes)
        self._complete()

    def landed(self, size: int, clock: Clock) -> None:
        """A load has ended, which brings so many bytes."""
        join(self._arriving, clock)
        self.bytes -= size
        if self.bytes < 0 and self.pending == 0:
            raise Hazard(f"{self.name}: {-self.bytes} bytes more than expected have come in phase {self.completed}")
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.completed += 1
            self.pending = self.count
            self.clock, self._arriving = self._arriving, {}

    def wait(self, phase: int) -> None:
        """Until the phase in progress has the other parity, as mbarrier.try_wait.parity."""
        self._initialized()
        self.scheduler.wait(
            lambda: (self.completed ^ int(phase)) & 1 == 1,
            lambda: f"phase {int(phase) & 1} of {self.name} ({self.state()})",
        )
        self.scheduler.me().learn(self.clock)

    def state(self) -> str:
        text = f"{self.completed} phases completed, {self.count - self.pending} of {self.count} arrived"
        return text + (f", {self.bytes} bytes outstanding" if self.bytes else "")

    def _initialized(self) -> None:
        if not self.count:
            raise Hazard(f"{source_line()}: {self.name} is used, and not initialized")

    def leftover(self) -> str | None:
        """What is wrong with it at the end of a CTA; None if nothing is."""
        if self.pending != self.count or self.bytes:
            return f"{self.name} is left in the middle of a phase: {self.state()}"
        return None


class BarrierArray:
    """Stands in for shared memory of mbarriers: [n, 1] of them."""

    def __init__(self, scheduler: Scheduler, shape: Sequence[int], name: str) -> None:
        self._barriers = [Barrier(scheduler, name) for _ in range(math.prod(shape))]
        self.shape = list(shape)
        self.name = name

    @property
    def name(self) -> str:
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name
        for i, barrier in enumerate(self._barriers):
            barrier.name = f"{name}[{i}]" if len(self._barriers) > 1 else name

    def index(self, index: int) -> Barrier:
        if not 0 <= index < len(self._barriers):
            raise Hazard(f"{source_line()}: {self.name} has {len(self._barriers)} mbarriers, {index} is none of them")
        return self._barriers[int(index)]

    def leftovers(self) -> list[str]:
        return [line for barrier in self._barriers if (line := barrier.leftover())]
