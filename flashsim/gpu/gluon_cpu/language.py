"""The operations of Gluon's language, for the CPU: what kernel source finds under their names."""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from flashsim.engine import Timeline
from flashsim.errors import Hazard, SimulationError
from flashsim.gpu.gluon_cpu.asynchronous import (
    Descriptor,
    Queues,
    check_ended,
    issue_load,
    issue_product,
    issue_store,
    wait_products,
)
from flashsim.gpu.gluon_cpu.memory import Barrier, BarrierArray, SharedView
from flashsim.gpu.gluon_cpu.scheduler import Party, Scheduler, source_line
from flashsim.gpu.gluon_cpu.tensors import TORCH, Accumulator, Int, Pointer, Tensor, plain

Axis = int | None


class Cta:
    """One CTA: what its parties share."""

    def __init__(self, scheduler: Scheduler, place: tuple[int, int, int]) -> None:
        self.scheduler = scheduler
        self.place = place
        self.name = "CTA " + ", ".join(map(str, place))
        self.barriers: list[BarrierArray] = []
        self.loads: dict[Timeline, int] = {}
        self.queues: dict[Party, Queues] = {}

    def party(self, name: str, body: Callable[[], None], clock: Any = None) -> Party:
        def whole() -> None:
            body()
            if left := self.queues[party].left():
                raise Hazard(f"{party.name} ends, and has not waited for {left[0]}")

        party = Party(self.scheduler, f"{name} of {self.name}", whole, clock)
        self.queues[party] = Queues(party)
        party.cta = self  # type: ignore[attr-defined]
        self.scheduler.add(party)
        return party

    def check_ended(self) -> None:
        """Raises Hazard for what is left behind."""
        check_ended(self.name, list(self.queues), self.loads)
        for array in self.barriers:
            for line in array.leftovers():
                raise Hazard(f"{self.name} ends, and {line}")


class Language:
    """`operations` has them by name: as in `gl`, those of mbarrier, tma and hopper after that name and a dot."""

    def __init__(self, scheduler: Scheduler, grid: tuple[int, int, int]) -> None:
        self.scheduler = scheduler
        self.grid = grid
        self.operations: dict[str, Any] = {name: getattr(self, name.replace(".", "_")) for name in METHODS} | FUNCTIONS

    # Where the kernel runs.

    def me(self) -> Party:
        return self.scheduler.me()

    def cta(self) -> Cta:
        return self.me().cta  # type: ignore[attr-defined,no-any-return]

    def program_id(self, axis: int) -> Int:
        return Int(self.cta().place[axis])

    def num_programs(self, axis: int) -> Int:
        return Int(self.grid[axis])

    def warp_specialize(
        self, functions_and_args: Sequence[Any], worker_num_warps: Sequence[int], worker_num_regs: Any = None
    ) -> Any:
        """The first function goes on in this party; the others are parties of their own."""
        default, *workers = functions_and_args
        for name, given in (("worker_num_warps", worker_num_warps), ("worker_num_regs", worker_num_regs)):
            if given is not None and len(given) != len(workers):
                raise TypeError(f"{name} has {len(given)} entries for {len(workers)} workers")
        me, cta = self.me(), self.cta()
        before = me.name
        me.tell()

        def worker(function: Any, args: Any) -> Callable[[], None]:
            return lambda: function(*args)

        parties = [
            cta.party(f"{function.__name__} (partition {i})", worker(function, args), dict(me.clock))
            for i, (function, args) in enumerate(workers, start=1)
        ]
        me.name = me.timeline.name = f"{default[0].__name__} (partition 0) of {cta.name}"
        result = default[0](*default[1])
        self.scheduler.wait(lambda: all(party.finished for party in parties), lambda: "the other partitions")
        for party in parties:
            me.learn(party.clock)
        me.name = me.timeline.name = before
        return result

    # Shared memory and mbarriers.

    def allocate_shared_memory(self, element_ty: Any, shape: Any, layout: Any, value: Any = None) -> Any:
        line = source_line()
        file, _, number = line.rpartition(":")
        assigned = re.match(r"\s*(\w+)\s*=", linecache.getline(file, int(number or 0)))
        name = assigned[1] if assigned else f"the memory allocated at {line}"
        shape = [int(n) for n in shape]
        if type(layout).__name__ == "MBarrierLayout":
            array = BarrierArray(self.scheduler, shape, name)
            self.cta().barriers.append(array)
            return array
        view = SharedView.allocate(self.scheduler, element_ty, shape, layout, name)
        if value is not None:
            view.store(value)
        return view

    def mbarrier_allocate_mbarrier(self, batch: int = 1, two_ctas: bool = False) -> Any:
        array = BarrierArray(self.scheduler, [batch, 1], f"the mbarrier allocated at {source_line()}")
        self.cta().barriers.append(array)
        return array

    def mbarrier_init(self, mbarrier: Barrier, count: int) -> None:
        mbarrier.init(count)

    def mbarrier_invalidate(self, mbarrier: Barrier) -> None:
        mbarrier.invalidate()

    def mbarrier_expect(self, mbarrier: Barrier, bytes_per_cta: int, pred: Any = True) -> None:
        if pred:
            self.scheduler.pause()
            mbarrier.arrive(1, bytes_per_cta)

    def mbarrier_arrive(self, mbarrier: Barrier, count: int = 1, pred: Any = True) -> None:
        if pred:
            self.scheduler.pause()
            mbarrier.arrive(count)

    def mbarrier_wait(self, mbarrier: Barrier, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        if pred:
            mbarrier.wait(phase)

    def hopper_fence_async_shared(self, cluster: bool = False) -> None:
        self.me().fence()

    # Asynchronous operations.

    def queues(self) -> Queues:
        return self.cta().queues[self.me()]

    def hopper_warpgroup_mma(
        self,
        a: Any,
        b: Any,
        acc: Any,
        use_acc: Any = True,
        precision: Any = None,
        max_num_imprecise_acc: Any = None,
        is_async: bool = False,
    ) -> Any:
        self.scheduler.pause()
        products = self.queues().products
        result = issue_product(products, a, b, acc, bool(use_acc))
        return result if is_async else wait_products(products, 0, [result])

    def hopper_warpgroup_mma_init(self, value: Any) -> Any:
        return value

    def hopper_warpgroup_mma_wait(self, num_outstanding: int = 0, deps: Any = None) -> Any:
        if deps is None:
            raise TypeError("warpgroup_mma_wait deps must be given")
        self.scheduler.pause()
        return wait_products(self.queues().products, num_outstanding, deps)

    def tma_async_load(
        self,
        tensor_desc: Descriptor,
        coord: Any,
        barrier: Barrier,
        result: SharedView,
        pred: Any = True,
        multicast: bool = False,
        cache_policy: Any = None,
    ) -> None:
        if multicast:
            raise SimulationError(f"{source_line()}: multicast is not among what gluon_cpu has: a cluster is one CTA")
        if pred:
            self.scheduler.pause()
            issue_load(self.scheduler, tensor_desc, [int(c) for c in coord], barrier, result, self.cta().loads)

    tma_async_copy_global_to_shared = tma_async_load

    def tma_async_store(self, tensor_desc: Descriptor, coord: Any, src: SharedView, cache_policy: Any = None) -> None:
        self.scheduler.pause()
        issue_store(self.queues().stores, tensor_desc, [int(c) for c in coord], src, add=False)

    tma_async_copy_shared_to_global = tma_async_store

    def tma_async_atomic_add(self, tensor_desc: Descriptor, coord: Any, src: SharedView) -> None:
        self.scheduler.pause()
        issue_store(self.queues().stores, tensor_desc, [int(c) for c in coord], src, add=True)

    def tma_store_wait(self, pendings: int, read_only: bool = True) -> None:
        self.scheduler.pause()
        self.queues().stores.wait(pendings)

    def tma_make_tensor_descriptor(
        self, base: Pointer, shape: Any, strides: Any, block_shape: Any, layout: Any, padding_option: str = "zero"
    ) -> Descriptor:
        start = base.base.as_strided((1,), (1,), base.base.storage_offset() + int(base.offset))
        return Descriptor(start, [int(n) for n in shape], [int(n) for n in strides], block_shape, layout)

    # Global memory.

    def load(self, pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Any:
        memory, index, chosen, scalar = pointer.cells(mask, source_line())
        found = torch.full(index.shape, 0, dtype=memory.dtype)
        if other is not None:
            found = found + torch.as_tensor(plain(other)).to(memory.dtype)
        found[chosen] = memory[index[chosen]]
        return lowered(found) if scalar else Tensor(found)

    def store(self, pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
        memory, index, chosen, _scalar = pointer.cells(mask, source_line())
        values = torch.as_tensor(plain(value)).to(memory.dtype).broadcast_to(index.shape)
        memory[index[chosen]] = values[chosen]

    def _atomic(self, pointer: Pointer, value: Any, mask: Any, change: Callable[[Any, Any], Any]) -> Any:
        self.scheduler.pause()
        memory, index, chosen, scalar = pointer.cells(mask, source_line())
        values = torch.as_tensor(plain(value)).to(memory.dtype).broadcast_to(index.shape)
        before = torch.zeros(index.shape, dtype=memory.dtype)
        for place in zip(*torch.nonzero(torch.atleast_1d(chosen), as_tuple=True), strict=True):
            at = () if scalar else place
            before[at] = memory[index[at]]
            memory[index[at]] = change(memory[index[at]], values[at])
        return lowered(before) if scalar else Tensor(before)

    def atomic_add(self, pointer: Pointer, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> Any:
        return self._atomic(pointer, val, mask, lambda a, b: a + b)

    def atomic_max(self, pointer: Pointer, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> Any:
        return self._atomic(pointer, val, mask, torch.maximum)

    def atomic_min(self, pointer: Pointer, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> Any:
        return self._atomic(pointer, val, mask, torch.minimum)

    def atomic_xchg(self, pointer: Pointer, val: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> Any:
        return self._atomic(pointer, val, mask, lambda a, b: b)

    def atomic_cas(self, pointer: Pointer, cmp: Any, val: Any, sem: Any = None, scope: Any = None) -> Any:
        expected = torch.as_tensor(plain(cmp))
        return self._atomic(pointer, val, None, lambda a, b: b if bool(a == expected) else a)


METHODS = (
    "program_id", "num_programs", "warp_specialize", "allocate_shared_memory", "load", "store",
    "atomic_add", "atomic_max", "atomic_min", "atomic_xchg", "atomic_cas",
    "mbarrier.allocate_mbarrier", "mbarrier.init", "mbarrier.invalidate", "mbarrier.expect", "mbarrier.arrive",
    "mbarrier.wait", "hopper.fence_async_shared", "hopper.warpgroup_mma", "hopper.warpgroup_mma_init",
    "hopper.warpgroup_mma_wait", "tma.async_load", "tma.async_copy_global_to_shared", "tma.async_store",
    "tma.async_copy_shared_to_global", "tma.async_atomic_add", "tma.store_wait", "tma.make_tensor_descriptor",
)  # fmt: skip


def lowered(x: torch.Tensor) -> Any:
    """A scalar of a kernel, where there are no dimensions left."""
    if x.ndim:
        return Tensor(x)
    return bool(x) if x.dtype == torch.bool else Tensor(x) if x.dtype.is_floating_point else Int(int(x))


def _elementwise(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def operation(*operands: Any, **_: Any) -> Any:
        found = [plain(x) for x in operands]
        if any(isinstance(x, torch.Tensor) and x.ndim for x in found):
            like = next(x for x in found if isinstance(x, torch.Tensor) and x.ndim)
            return Tensor(function(*(torch.as_tensor(x, dtype=_as(x, like)) for x in found)))
        return lowered(function(*(torch.as_tensor(x) for x in found)))

    return operation


def _as(x: Any, like: torch.Tensor) -> torch.dtype | None:
    """A number takes the dtype of the tensor it meets, if that can hold it."""
    fractional = isinstance(x, float) and not like.dtype.is_floating_point
    if isinstance(x, torch.Tensor | bool) or fractional:
        return None
    return like.dtype


def _reduction(function: Callable[[torch.Tensor, Any, bool], torch.Tensor]) -> Callable[..., Any]:
    def operation(x: Tensor, axis: Axis = None, keep_dims: bool = False, **_: Any) -> Any:
        data = plain(x)
        axes = tuple(range(data.ndim)) if axis is None else (axis,)
        return lowered(function(data, axes, keep_dims))

    return operation


def _without_nan(data: torch.Tensor, least: float) -> torch.Tensor:
    """Triton's max and min pass over NaN."""
    return data.nan_to_num(nan=least, posinf=math.inf, neginf=-math.inf) if data.dtype.is_floating_point else data


def _sum(data: torch.Tensor, axes: Any, keep: bool) -> torch.Tensor:
    total: torch.Tensor = data.sum(axes, keepdim=keep)
    return total.to(data.dtype if data.dtype.is_floating_point or data.dtype == torch.int64 else torch.int32)


def _full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Tensor:
    return Tensor(torch.full([int(n) for n in shape], plain(value), dtype=TORCH[str(dtype)]))


def _where(condition: Any, x: Any, y: Any) -> Any:
    c, a, b = (torch.as_tensor(plain(v)) for v in (condition, x, y))
    if a.ndim and not b.ndim:
        b = b.to(a.dtype)
    elif b.ndim and not a.ndim:
        a = a.to(b.dtype)
    return lowered(torch.where(c, a, b))


def _range(*bounds: Any) -> Iterator[Int]:
    return map(Int, range(*(int(x) for x in bounds)))


def _device_assert(condition: Any, msg: str = "", mask: Any = None) -> None:
    if not torch.as_tensor(plain(condition)).all():
        raise Hazard(f"{source_line()}: device_assert failed: {msg}")


def _static_assert(condition: Any, msg: str = "") -> None:
    if not condition:
        raise SimulationError(f"{source_line()}: static_assert failed: {msg}")


def _to_tensor(x: Any) -> Any:
    return Int(x) if isinstance(x, int) and not isinstance(x, bool) else x


def _same(x: Any, *_: Any, **__: Any) -> Any:
    if isinstance(x, Accumulator):
        raise x.early()
    return x


def _nothing(*_: Any, **__: Any) -> None:
    pass


FUNCTIONS: dict[str, Any] = {
    **{name: _elementwise(getattr(torch, name)) for name in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "abs")},
    **{name: _elementwise(getattr(torch, name)) for name in ("floor", "ceil", "sin", "cos", "erf", "sigmoid")},
    "sqrt_rn": _elementwise(torch.sqrt),
    "maximum": _elementwise(lambda a, b: torch.fmax(a, b) if a.dtype.is_floating_point else torch.maximum(a, b)),
    "minimum": _elementwise(lambda a, b: torch.fmin(a, b) if a.dtype.is_floating_point else torch.minimum(a, b)),
    "add": _elementwise(torch.add),
    "sub": _elementwise(torch.sub),
    "mul": _elementwise(torch.mul),
    "fdiv": _elementwise(torch.div),
    "div_rn": _elementwise(torch.div),
    "fma": _elementwise(lambda a, b, c: (a.double() * b.double() + c.double()).to(a.dtype)),
    "clamp": _elementwise(torch.clamp),
    "where": _where,
    "max": _reduction(lambda x, axes, keep: _without_nan(x, -math.inf).amax(axes, keepdim=keep)),
    "min": _reduction(lambda x, axes, keep: _without_nan(x, math.inf).amin(axes, keepdim=keep)),
    "sum": _reduction(_sum),
    "cdiv": lambda a, b: (a + b - 1) // b,
    "arange": lambda start, end, layout=None: Tensor(torch.arange(int(start), int(end), dtype=torch.int32)),
    "full": _full,
    "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype),
    "zeros_like": lambda x, **_: Tensor(torch.zeros_like(x.data)),
    "full_like": lambda x, value, **_: Tensor(torch.full_like(x.data, plain(value))),
    "expand_dims": lambda x, axis: Tensor(plain(x).unsqueeze(axis)),
    "broadcast": lambda x, y: tuple(map(Tensor, torch.broadcast_tensors(plain(x), plain(y)))),
    "reshape": lambda x, *shape: Tensor(plain(x).reshape(shape[0] if isinstance(shape[0], list | tuple) else shape)),
    "permute": lambda x, *order: Tensor(plain(x).permute(order[0] if isinstance(order[0], list | tuple) else order)),
    "join": lambda a, b: Tensor(torch.stack((plain(a), plain(b)), -1)),
    "split": lambda x: tuple(map(Tensor, plain(x).unbind(-1))),
    "cast": lambda x, dtype, *_, **__: x.to(dtype),
    "convert_layout": _same,
    "set_auto_layout": _same,
    "assume": _nothing,
    "multiple_of": _same,
    "max_contiguous": _same,
    "max_constancy": _same,
    "to_tensor": _to_tensor,
    "static_range": _range,
    "range": _range,
    "num_ctas": lambda: 1,
    "barrier": _nothing,
    "thread_barrier": _nothing,
    "debug_barrier": _nothing,
    "static_assert": _static_assert,
    "device_assert": _device_assert,
    "static_print": _nothing,
    "device_print": _nothing,
}
