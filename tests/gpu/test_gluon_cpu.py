"""Gluon kernels on the CPU: small ones that are right, and wrong ones whose mistakes have to be found."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.hopper import (  # noqa: E402
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

from flashsim.errors import Deadlock, Hazard, InputError, Race, SimulationError  # noqa: E402
from flashsim.gpu import gluon_cpu  # noqa: E402

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
ROW = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
WIDE = gl.constexpr(gl.NVMMASharedLayout(32, 16, 2))
SEEDS = range(6)


def line_of(kernel: Any, text: str) -> str:
    """file:line of a line of a kernel's source."""
    lines, first = inspect.getsourcelines(kernel.fn)
    (number,) = (first + n for n, line in enumerate(lines) if text in line)
    return f"test_gluon_cpu.py:{number}"


def descriptor(x: Any, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, gl.NVMMASharedLayout(32, 16, 2))


# Values.


@gluon.jit
def add_kernel(x, y, out, n, BLOCK: gl.constexpr):
    at = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, ROW)
    total = gl.load(x + at, mask=at < n, other=0.0)
    total += gl.load(y + at, mask=at < n, other=0.0)
    gl.store(out + at, total.to(gl.bfloat16), mask=at < n)


def test_loads_sums_and_rounding() -> None:
    x, y = torch.randn(100), torch.randn(100)
    out = torch.full((100,), float("nan"), dtype=torch.bfloat16)
    gluon_cpu.run(add_kernel, (4,), {"x": x, "y": y, "out": out, "n": 100, "BLOCK": 32, "num_warps": 4})
    assert torch.equal(out, (x + y).bfloat16())


def test_in_place_of_gpu() -> None:
    x, out = torch.randn(64), torch.zeros(64, dtype=torch.bfloat16)
    with gluon_cpu.in_place_of_gpu(add_kernel):
        add_kernel[(2,)](x, x, out, 64, BLOCK=32)
        add_kernel[lambda given: (64 // given["BLOCK"],)](x, x, out, n=64, BLOCK=16)
    assert torch.equal(out, (x + x).bfloat16())
    assert "run" not in vars(add_kernel)


@gluon.jit
def scalar_kernel(out, a, b):
    gl.store(out, a // b)
    gl.store(out + 1, a % b)
    gl.store(out + 2, gl.maximum(a, b))
    gl.store(out + 3, gl.cdiv(b, 3))
    rows = gl.arange(0, 4, ROW)
    gl.store(out + 4, gl.sum(gl.where(rows > 1, rows, 10), 0))
    again = rows
    again += 1
    gl.store(out + 5, gl.max(rows, 0))


def test_division_truncates_and_nothing_changes_in_place() -> None:
    out = torch.zeros(6, dtype=torch.int32)
    gluon_cpu.run(scalar_kernel, (1,), {"out": out, "a": -7, "b": 2})
    assert out.tolist() == [-3, -1, 2, 1, 25, 3]


@gluon.jit
def copy_kernel(x_desc, out_desc, row, column):
    slot = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_shape, x_desc.layout)
    landed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(landed.index(0), count=1)
    mbarrier.expect(landed.index(0), x_desc.block_type.nbytes)
    tma_load(x_desc, [row, column], landed.index(0), slot)
    mbarrier.wait(landed.index(0), 0)
    tma_store(out_desc, [row, column], slot)
    tma.store_wait(0)


@pytest.mark.parametrize("completion", ["late", "random"])
def test_boxes_beyond_the_end(completion: gluon_cpu.Completion) -> None:
    x = torch.randn(10, 24).half()
    out = torch.zeros(40, 40, dtype=torch.float16)
    arguments = {"x_desc": descriptor(x, [8, 16]), "out_desc": descriptor(out[:16, :32], [8, 16])}
    gluon_cpu.run(copy_kernel, (1,), arguments | {"row": 8, "column": 16}, completion=completion)
    expected = torch.zeros(40, 40, dtype=torch.float16)
    expected[8:10, 16:24] = x[8:, 16:]
    assert torch.equal(out, expected)


# Partitions.


@gluon.jit
def ticket_taker(counter, order, NUMBER: gl.constexpr):
    for _ in range(4):
        gl.store(order + gl.atomic_add(counter, 1), NUMBER)


@gluon.jit
def ticket_kernel(counter, order):
    gl.warp_specialize([(ticket_taker, (counter, order, gl.constexpr(n))) for n in (0, 1, 2)], [4, 1], [24, 24])


def order_of(seed: int, resident: int = 1) -> list[int]:
    order = torch.full((24,), -1, dtype=torch.int32)
    counter = torch.zeros(1, dtype=torch.int32)
    gluon_cpu.run(ticket_kernel, (2,), {"counter": counter, "order": order}, seed=seed, resident=resident)
    return order.tolist()


def test_the_seed_decides_the_interleaving() -> None:
    orders = [order_of(seed) for seed in SEEDS]
    assert orders == [order_of(seed) for seed in SEEDS]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert all(sorted(order) == [0] * 8 + [1] * 8 + [2] * 8 for order in orders)
    assert order_of(1, resident=2) != order_of(1)


@gluon.jit
def writer(slots, told, NUMBER: gl.constexpr, TELL: gl.constexpr):
    slots.index(NUMBER).store(gl.full([32], NUMBER, gl.int32, ROW))
    if TELL:
        mbarrier.arrive(told.index(NUMBER), count=1)


@gluon.jit
def reader(slots, told, out, HEARD: gl.constexpr):
    mbarrier.wait(told.index(HEARD), 0)
    gl.store(out + gl.arange(0, 32, ROW), slots.index(0).load(ROW))


@gluon.jit
def message_kernel(out, HEARD: gl.constexpr, TELL: gl.constexpr):
    slots = gl.allocate_shared_memory(gl.int32, [2, 32], PLAIN)
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(told.index(i), count=1)
    gl.warp_specialize(
        [
            (reader, (slots, told, out, HEARD)),
            (writer, (slots, told, gl.constexpr(0), TELL)),
            (writer, (slots, told, gl.constexpr(1), True)),
        ],
        [4, 4],
        [24, 24],
    )


def message(seed: int, heard: int, tell: bool) -> Any:
    out = torch.full((32,), -1, dtype=torch.int32)
    gluon_cpu.run(message_kernel, (1,), {"out": out, "HEARD": heard, "TELL": tell}, seed=seed)
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_a_message(seed: int) -> None:
    assert (message(seed, 0, True) == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lost_signal(seed: int) -> None:
    with pytest.raises(Deadlock) as caught:
        message(seed, 0, False)
    text = str(caught.value)
    assert "reader (partition 0) of CTA 0, 0, 0 waits for phase 0 of told[0] (0 phases completed, 0 of 1" in text
    assert line_of(reader, "mbarrier.wait") in text


@pytest.mark.parametrize("seed", SEEDS)
def test_a_race_that_timing_hides(seed: int) -> None:
    """Somebody else's signal is waited for: that the right message is there mostly, orders nothing."""
    with pytest.raises((Race, Hazard)) as caught:
        message(seed, 1, True)
    assert "slots[0]" in str(caught.value)
    if isinstance(caught.value, Race):
        assert line_of(reader, "slots.index(0).load") in str(caught.value)


def test_the_race_is_seen_whichever_comes_first() -> None:
    kinds = set()
    for seed in range(20):
        with pytest.raises((Race, Hazard)) as caught:
            message(seed, 1, True)
        kinds.add(type(caught.value))
    assert Race in kinds


# mbarriers, one mistake each.


@gluon.jit
def barrier_kernel(MISTAKE: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=2)
    mbarrier.arrive(bars.index(0), count=1)
    if MISTAKE == "over-arrival":
        mbarrier.arrive(bars.index(0), count=2)
    if MISTAKE == "not initialized":
        mbarrier.arrive(bars.index(1), count=1)
    if MISTAKE == "initialized twice":
        mbarrier.init(bars.index(0), count=2)
    if MISTAKE == "out of range":
        mbarrier.arrive(bars.index(2), count=1)
    if MISTAKE != "left over":
        mbarrier.arrive(bars.index(0), count=1)
        mbarrier.wait(bars.index(0), 0)


BARRIER_MISTAKES = {
    "over-arrival": "arrives 2 times at bars[0], of whose phase 0 1 of 2 have arrived",
    "not initialized": "bars[1] is used, and not initialized",
    "initialized twice": "bars[0] is initialized a second time",
    "out of range": "bars has 2 mbarriers, 2 is none of them",
    "left over": "bars[0] is left in the middle of a phase: 0 phases completed, 1 of 2 arrived",
}


@pytest.mark.parametrize("mistake", BARRIER_MISTAKES)
def test_barrier_mistakes(mistake: str) -> None:
    gluon_cpu.run(barrier_kernel, (1,), {"MISTAKE": "none"})
    with pytest.raises(Hazard) as caught:
        gluon_cpu.run(barrier_kernel, (1,), {"MISTAKE": mistake})
    assert BARRIER_MISTAKES[mistake] in str(caught.value)


# TMA and wgmma, one mistake each.


@gluon.jit
def product_kernel(a_desc, b_desc, out, MISTAKE: gl.constexpr):
    a = gl.allocate_shared_memory(gl.float16, [64, 16], WIDE)
    b = gl.allocate_shared_memory(gl.float16, [16, 16], WIDE)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    A_BYTES: gl.constexpr = 64 * 16 * 2
    mbarrier.expect(bars.index(0), A_BYTES // 2 if MISTAKE == "too few bytes" else A_BYTES)
    tma_load(a_desc, [0, 0], bars.index(0), a)
    mbarrier.expect(bars.index(1), 16 * 16 * 2 + (2 if MISTAKE == "too many bytes" else 0))
    tma_load(b_desc, [0, 0], bars.index(1), b)
    if MISTAKE != "load not waited for":
        mbarrier.wait(bars.index(0), 0)
    mbarrier.wait(bars.index(1), 0)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    zero = gl.zeros([64, 16], gl.float32, ACC)
    c = warpgroup_mma(a, b, zero, is_async=True)
    c2 = warpgroup_mma(a, b, c, is_async=True)
    if MISTAKE == "operand overwritten":
        b.store(gl.zeros([16, 16], gl.float16, ACC))
    if MISTAKE == "operand reloaded":
        mbarrier.expect(bars.index(1), 16 * 16 * 2)
        tma_load(b_desc, [0, 0], bars.index(1), b)
    if MISTAKE == "result used early":
        c2 = c2 + 1.0
    if MISTAKE == "wrong wait":
        c2 = warpgroup_mma_wait(1, deps=[c2]) + 1.0
    if MISTAKE != "product not waited for":
        c2 = warpgroup_mma_wait(0, deps=[c2])
        rows = gl.arange(0, 64, gl.SliceLayout(1, ACC))
        columns = gl.arange(0, 16, gl.SliceLayout(0, ACC))
        at = out + rows[:, None] * 16 + columns[None, :]
        gl.store(at + 1 if MISTAKE == "out of bounds" else at, c2)
    if MISTAKE == "histogram":
        gl.histogram(zero, 4)


PRODUCT_MISTAKES: dict[str, tuple[type[BaseException], str]] = {
    "too few bytes": (Hazard, "bars[0]: 1024 bytes more than expected have come in phase 0"),
    "too many bytes": (Deadlock, "phase 0 of bars[1] (0 phases completed, 1 of 1 arrived, 2 bytes outstanding)"),
    "load not waited for": (Race, "race on a: nothing orders a TMA load of a"),
    "operand overwritten": (Race, "race on b: nothing orders a product's read of b"),
    "operand reloaded": (Race, "race on b: nothing orders a product's read of b"),
    "result used early": (Hazard, "the result of a product of a and b"),
    "wrong wait": (Hazard, "the result of a product of a and b"),
    "product not waited for": (Hazard, "has not waited for a product of a and b"),
    "out of bounds": (Hazard, "element 1024 of a tensor that has 1024 of them"),
    "histogram": (SimulationError, "histogram is not among the operations that gluon_cpu has"),
}


def product(mistake: str, seed: int, completion: gluon_cpu.Completion) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    a, b, out = torch.randn(64, 16).half(), torch.randn(16, 16).half(), torch.zeros(64, 16)
    arguments = {"a_desc": descriptor(a, [64, 16]), "b_desc": descriptor(b, [16, 16]), "out": out, "MISTAKE": mistake}
    gluon_cpu.run(product_kernel, (1,), arguments, seed=seed, completion=completion)
    return out, 2 * (a.float() @ b.float())


@pytest.mark.parametrize("completion", ["late", "random"])
def test_products(completion: gluon_cpu.Completion) -> None:
    for seed in SEEDS:
        out, expected = product("none", seed, completion)
        assert torch.allclose(out, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("completion", ["late", "random"])
@pytest.mark.parametrize("mistake", PRODUCT_MISTAKES)
def test_product_mistakes(mistake: str, completion: gluon_cpu.Completion) -> None:
    kind, message = PRODUCT_MISTAKES[mistake]
    for seed in SEEDS:
        with pytest.raises(kind) as caught:
            product(mistake, seed, completion)
        assert message in str(caught.value)


@gluon.jit
def store_kernel(out_desc, MISTAKE: gl.constexpr):
    slot = gl.allocate_shared_memory(gl.float16, [16, 16], WIDE)
    if MISTAKE != "never written":
        slot.store(gl.full([16, 16], 1.0, gl.float16, ROW))
    if MISTAKE != "no fence":
        fence_async_shared()
    tma_store(out_desc, [0, 0], slot)
    if MISTAKE == "overwritten":
        slot.store(gl.full([16, 16], 2.0, gl.float16, ROW))
    if MISTAKE != "not waited for":
        tma.store_wait(0)


STORE_MISTAKES: dict[str, tuple[type[BaseException], str]] = {
    "never written": (Hazard, "a TMA store of slot, to which nothing has been written"),
    "no fence": (Race, "no fence_async_shared after that store is known to it"),
    "overwritten": (Race, "race on slot: nothing orders a TMA store of slot"),
    "not waited for": (Hazard, "has not waited for a TMA store of slot"),
}


@pytest.mark.parametrize("mistake", ["none", *STORE_MISTAKES])
def test_stores(mistake: str) -> None:
    out = torch.zeros(16, 16, dtype=torch.float16)
    arguments = {"out_desc": descriptor(out, [16, 16]), "MISTAKE": mistake}
    if mistake == "none":
        gluon_cpu.run(store_kernel, (1,), arguments)
        assert (out == 1).all()
        return
    kind, message = STORE_MISTAKES[mistake]
    with pytest.raises(kind) as caught:
        gluon_cpu.run(store_kernel, (1,), arguments)
    assert message in str(caught.value)
    assert "test_gluon_cpu.py:" in str(caught.value)


# Views of shared memory.


@gluon.jit
def view_kernel(out, REINTERPRET: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.int32, [4, 8], PLAIN)
    rows = gl.arange(0, 4, gl.SliceLayout(1, ROW))
    columns = gl.arange(0, 8, gl.SliceLayout(0, ROW))
    memory.store(gl.expand_dims(rows, 1) * 8 + gl.expand_dims(columns, 0))
    total = gl.sum(memory.slice(2, 2, dim=1).load(ROW), 0)  # columns 2 and 3
    gl.store(out + gl.arange(0, 2, ROW), total)
    gl.store(out + 2 + gl.arange(0, 2, ROW), gl.sum(memory.permute((1, 0)).slice(2, 2).load(ROW), 1))
    gl.store(out + 4, gl.max(memory.reshape([2, 16]).index(0).load(ROW), 0))
    if REINTERPRET:
        half = memory.reinterpret(gl.float16, [4, 8], PLAIN)
    else:
        half = memory._reinterpret(gl.float16, [4, 8], PLAIN)
    half.store(gl.full([4, 8], 0.0, gl.float16, ROW))
    gl.store(out + 5, gl.max(gl.max(memory.load(ROW), 1), 0))


def test_views() -> None:
    out = torch.full((6,), -1, dtype=torch.int32)
    for public in (True, False):
        gluon_cpu.run(view_kernel, (1,), {"out": out, "REINTERPRET": public})
        assert out.tolist() == [56, 60, 56, 60, 15, 31]


# What does not fit.


@gluon.jit
def broken_kernel(x):
    for _ in range(2):
        x.no_such_thing()


def test_errors_have_a_line() -> None:
    with pytest.raises(SimulationError) as caught:
        gluon_cpu.run(broken_kernel, (1,), {"x": torch.zeros(1)})
    assert line_of(broken_kernel, "no_such_thing") in str(caught.value)
    assert "AttributeError" in str(caught.value)


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="arguments: broken_kernel needs x"):
        gluon_cpu.run(broken_kernel, (1,), {})
    with pytest.raises(InputError, match="completion: got 'early', allowed are late and random"):
        gluon_cpu.run(broken_kernel, (1,), {"x": torch.zeros(1)}, completion="early")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="x: on meta, must be on the CPU"):
        gluon_cpu.run(broken_kernel, (1,), {"x": torch.zeros(1, device="meta")})
