"""What a warpgroup issues and does not wait for: wgmma products, TMA loads and TMA stores.

Operands in shared memory are read when the operation happens, which is as late as a wait for it allows, or earlier at
random: what overwrites them too early changes the result. Who may touch what when is checked when it is issued.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flashsim.engine import Clock, Timeline
from flashsim.errors import Hazard
from flashsim.gpu.gluon_cpu.memory import Barrier, SharedView
from flashsim.gpu.gluon_cpu.scheduler import Party, Scheduler, source_line
from flashsim.gpu.gluon_cpu.tensors import Accumulator, Tensor, width


@dataclass
class Operation:
    """One operation of a queue. `happen` is called once."""

    happen: Callable[[], None]
    what: str
    clock: Clock
    """What its end tells whoever waits for it."""
    happened: bool = False


@dataclass
class Queue:
    """Operations of one party that end in the order of their issue."""

    party: Party
    timeline: Timeline
    operations: list[Operation] = field(default_factory=list)
    """Those that nobody has waited for."""

    def issue(self, happen: Callable[[], None], what: str) -> tuple[Operation, int, Clock]:
        """(operation, its number on the timeline, what it knows when it begins)."""
        number = self.timeline.step()
        known = {**self.party.tell(), self.timeline: number}
        operation = Operation(happen, f"{what} ({source_line()})", known)
        self.operations.append(operation)
        if not self.party.scheduler.late:
            self.party.scheduler.events.append(lambda: self.happen(operation))
        return operation, number, known

    def happen(self, last: Operation) -> None:
        """All operations up to this one."""
        for operation in self.operations:
            if not operation.happened:
                operation.happened = True
                operation.happen()
            if operation is last:
                break

    def wait(self, left: int) -> None:
        """Until all have ended but the `left` that were issued last."""
        ended = self.operations[: len(self.operations) - left] if left else self.operations
        for operation in ended:
            self.happen(operation)
            self.party.learn(operation.clock)
        self.operations = self.operations[len(ended) :]


class Queues:
    """Those of one party."""

    def __init__(self, party: Party) -> None:
        self.products = Queue(party, Timeline(f"a product of {party.name}"))
        self.stores = Queue(party, Timeline(f"a TMA store of {party.name}"))

    def left(self) -> list[str]:
        """What has been issued and never waited for."""
        return [operation.what for queue in (self.products, self.stores) for operation in queue.operations]


def issue_product(queue: Queue, a: Any, b: Any, acc: Any, use_acc: bool) -> Accumulator:
    """acc + a b, or a b: a in registers or in shared memory, b in shared memory, fp32 sums."""
    shapes = [list(x.shape) for x in (a, b, acc)]
    (m, k), (k_b, n), result_shape = shapes
    if k != k_b or [m, n] != result_shape:
        raise TypeError(f"a product of {shapes[0]} and {shapes[1]} into {shapes[2]}")
    if not isinstance(b, SharedView):
        raise TypeError("the right operand of warpgroup_mma has to be in shared memory")
    if a.data.dtype != b.data.dtype:
        raise TypeError(f"a product of {a.data.dtype} and {b.data.dtype}")
    result = Accumulator(result_shape)
    addend = acc if isinstance(acc, Accumulator) else acc.data

    def happen() -> None:
        product = a.data.float() @ b.data.float()
        before = addend.data if isinstance(addend, Accumulator) else addend
        result.data = product + before if use_acc else product

    what = "a product of {} and {}".format(*(x.name if isinstance(x, SharedView) else "registers" for x in (a, b)))
    operation, number, known = queue.issue(happen, what)
    result.operation = operation
    for x in (a, b):
        if isinstance(x, SharedView):
            x.allocation.read(x, queue.timeline, number, known, "a product's read", asynchronous=True)
    return result


def wait_products(queue: Queue, left: int, deps: Sequence[Any]) -> Any:
    """The `deps`, those whose product has ended as tensors."""
    queue.wait(left)

    def value(x: Any) -> Any:
        if not isinstance(x, Accumulator) or any(x.operation is operation for operation in queue.operations):
            return x
        assert x.data is not None
        return Tensor(x.data)

    values = tuple(value(x) for x in deps)
    return values[0] if len(values) == 1 else values


@dataclass
class BlockType:
    """What a box of a descriptor is."""

    shape: list[int]
    element_ty: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * width(self.element_ty)


class Descriptor:
    """Stands in for `tma.tensor_descriptor`: boxes of a tensor in global memory, 0 beyond its ends."""

    def __init__(
        self, base: torch.Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int], layout: Any
    ) -> None:
        self.tensor = base.detach().as_strided(tuple(shape), tuple(strides))
        self.block_type = BlockType([int(n) for n in block], Tensor(base).dtype)
        self.dtype = self.block_type.element_ty
        self.layout = layout
        self.shape, self.strides = list(shape), list(strides)

    @property
    def block_shape(self) -> list[int]:
        return self.block_type.shape

    def box(self, coordinates: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the tensor that a box at these coordinates has, and where in the box that lies."""
        if len(coordinates) != len(self.block_shape):
            raise TypeError(f"{len(coordinates)} coordinates for a descriptor of {len(self.block_shape)} dimensions")
        of_tensor, of_box = [], []
        for first, size, length in zip(coordinates, self.block_shape, self.tensor.shape, strict=True):
            begin, end = max(int(first), 0), min(int(first) + size, length)
            end = max(begin, end)
            of_tensor.append(slice(begin, end))
            of_box.append(slice(begin - int(first), end - int(first)))
        return tuple(of_tensor), tuple(of_box)

    def read(self, coordinates: Sequence[int]) -> torch.Tensor:
        of_tensor, of_box = self.box(coordinates)
        found = torch.zeros(self.block_shape, dtype=self.tensor.dtype)
        found[of_box] = self.tensor[of_tensor]
        return found

    def write(self, coordinates: Sequence[int], values: torch.Tensor) -> None:
        of_tensor, of_box = self.box(coordinates)
        self.tensor[of_tensor] = values.reshape(self.block_shape)[of_box]

    def add(self, coordinates: Sequence[int], values: torch.Tensor) -> None:
        of_tensor, of_box = self.box(coordinates)
        self.tensor[of_tensor] += values.reshape(self.block_shape)[of_box]

    def check(self, view: SharedView) -> None:
        if view.numel != math.prod(self.block_shape) or view.data.dtype != self.tensor.dtype:
            raise TypeError(f"a box of {self.dtype} {self.block_shape}, and {view.name} of {view.dtype} {view.shape}")


def issue_load(
    scheduler: Scheduler,
    desc: Descriptor,
    coordinates: Sequence[int],
    barrier: Barrier,
    into: SharedView,
    under_way: dict[Timeline, int],
) -> None:
    """Copy a box to shared memory, and tell the barrier. `under_way` counts the loads into each place."""
    desc.check(into)
    me = scheduler.me()
    where = into.spans[0][0], into.spans[-1][1]
    on = into.allocation.loads.setdefault(where, Timeline(f"a load into {into.name}"))
    number, known = on.step(), me.tell()
    into.allocation.write(into, on, number, known, "a TMA load", asynchronous=True)
    if into.data.dtype.is_floating_point:
        into.data.fill_(math.nan)

    under_way[on] = under_way.get(on, 0) + 1

    def end() -> None:
        under_way[on] -= 1
        into.data.copy_(desc.read(coordinates).view(into.shape))
        barrier.landed(desc.block_type.nbytes, {**known, on: number})

    scheduler.events.append(end)


def issue_store(queue: Queue, desc: Descriptor, coordinates: Sequence[int], view: SharedView, add: bool) -> None:
    """Copy shared memory to a box, or add it there; what lies beyond the tensor is left out."""
    desc.check(view)
    happen = desc.add if add else desc.write
    _, number, known = queue.issue(lambda: happen(coordinates, view.data), f"a TMA store of {view.name}")
    view.allocation.read(view, queue.timeline, number, known, "a TMA store", asynchronous=True)


def check_ended(cta: str, parties: Sequence[Party], loads: dict[Timeline, int]) -> None:
    """Raises Hazard for a load that is under way, or whose end none of the parties knows of."""
    for on, under_way in loads.items():
        if under_way or all(party.clock.get(on, 0) < on.count for party in parties):
            raise Hazard(f"{cta} ends, and nobody has waited for {on.name}")
