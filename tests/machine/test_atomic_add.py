"""Atomic additions to HBM: what they sum to, what they race with, and what they cost.

The kernel is four CTAs, one for each block of keys, which all add to the same blocks of an fp32 tensor, `total`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashsim.check.example import KINDS, Latencies
from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import Race, SimulationError
from flashsim.machine.copies import RED_BYTE_PER_CLK
from flashsim.machine.costs import Costs
from flashsim.machine.gpu import FullSimulation, KernelRun
from flashsim.machine.options import Options
from flashsim.problem import AttentionProblem
from flashsim.schedules import Grid, Kernel, Role
from flashsim.schedules.tensors import Tensor
from flashsim.schedules.verbs import CTA, Operand, Program, Registers, Warpgroup, WorkTile
from flashsim.units import ticks

M = N = 64
CTAS, BLOCKS, D = 4, 2, 32
PROBLEM = AttentionProblem(batch=1, heads_q=1, seqlen_q=BLOCKS * M, seqlen_k=CTAS * N, head_dim=D)
TOTAL_BYTE = BLOCKS * M * D * 4
SLOW = Latencies((("memory", "random"), ("link", "random"), ("smem", "random")), seed=1)

Say = Callable[[Warpgroup, WorkTile, int, Any], Any]
"""What a warpgroup does with a block of `total`: called with itself, a work tile, an item of its loop, and a source."""


def registers(regs: Registers) -> Operand:
    return regs.tile("ones", (M, D))


def slot(cta: CTA) -> Operand:
    return cta.slot("ones", (M, D), "fp32")


def kernel(say: Say, count: int = 1, copy: str = "cp.async", keys: int = N) -> Kernel:
    """Each warpgroup fills a tile with ones, in registers and in shared memory, and does `say` for each block."""

    def program(wg: Warpgroup, shared: Operand, tile: Operand) -> Program:
        for work in wg.tiles():
            wg.map("fill", 1.0, into=tile)
            if wg.index == 0:
                wg.convert(tile, into=shared)
            for i in wg.q_tiles(work):
                done = say(wg, work, i, shared if copy == "tma" else tile)
                if done is not None:
                    yield done

    return Kernel(
        "adds",
        (Role("warps", program, count, registers=registers),),
        slot,
        Grid(over="keys"),
        BLOCK_M=M,
        BLOCK_N=keys,
        mma="mma.sync",
        copy=copy,  # type: ignore[arg-type]
        workspace={"total": Tensor("queries", "head_dim", "fp32")},
    )


def device(l2_byte: int = 1 << 30, sms: int = CTAS) -> DeviceSpec:
    h100 = load_device("h100-sxm5")
    memory = replace(h100.memory, l2_share_byte=l2_byte)
    return replace(h100, sm=replace(h100.sm, count=sms), memory=memory)


def run(
    one: Kernel, on: DeviceSpec | None = None, latencies: Latencies | None = None, functional: bool = True
) -> tuple[KernelRun, Any]:
    """The launch, and what `total`, which was 0, is after it."""
    total = np.zeros((1, BLOCKS * M, 1, D))
    tensors = {"total": total, "Q": np.zeros_like(total)} if functional else None
    settings = Options(draw=latencies.draw() if latencies else None, tensors=tensors)
    return FullSimulation(on or device(), 1000, one, PROBLEM, settings).run(), total


def add(wg: Warpgroup, work: WorkTile, i: int, ones: Any) -> Any:
    """TMA needs to be waited for; an addition from registers does not."""
    done = wg.atomic_add(ones, into=work.total(i))
    return done if ones.place == "shared" else None


def plain(wg: Warpgroup, work: WorkTile, i: int, ones: Any) -> Any:
    done = wg.store(ones, into=work.total(i))
    return done if ones.place == "shared" else None


def number_of(work: WorkTile) -> int:
    return work.where.block  # type: ignore[no-any-return]


def only(which: int, then: Say, otherwise: Say | None = None) -> Say:
    """`then` in the CTA of one block of keys, `otherwise` in all others."""

    def say(wg: Warpgroup, work: WorkTile, i: int, ones: Any) -> Any:
        chosen = then if number_of(work) == which else otherwise
        return None if chosen is None else chosen(wg, work, i, ones)

    return say


COPIES = pytest.mark.parametrize("copy", ["cp.async", "tma"], ids=["registers", "shared"])


# What comes out.


@COPIES
@pytest.mark.parametrize("latencies", [None, SLOW, *(Latencies(((kind, "far beyond"),), 3) for kind in KINDS)])
def test_every_addition_counts_once(copy: str, latencies: Latencies | None) -> None:
    _, total = run(kernel(add, copy=copy), latencies=latencies)
    assert np.all(total == CTAS)


@pytest.mark.parametrize("part", ["rows", "columns"])
def test_warpgroups_add_their_parts(part: str) -> None:
    """Two warpgroups of each CTA add to a half each."""

    def halves(wg: Warpgroup, work: WorkTile, i: int, ones: Any) -> None:
        half = (wg.index * (M if part == "rows" else D) // 2, (M if part == "rows" else D) // 2)
        wg.atomic_add(getattr(ones, part)(*half), into=getattr(work.total(i), part)(*half))

    _, total = run(kernel(halves, count=2))
    assert np.all(total == CTAS)


def test_what_is_added_from_registers_is_what_they_held_when_it_was_said() -> None:
    """RED reads its registers when it is issued: they can be overwritten at once."""

    def overwrite(wg: Warpgroup, work: WorkTile, i: int, ones: Any) -> None:
        wg.map("fill", 3.0, into=ones)
        wg.atomic_add(ones, into=work.total(i))
        wg.map("fill", 100.0, into=ones)

    _, total = run(kernel(overwrite), latencies=SLOW)
    assert np.all(total == 3 * CTAS)


def test_shared_memory_that_is_being_added_must_not_be_overwritten() -> None:
    def overwrite(wg: Warpgroup, work: WorkTile, i: int, ones: Any) -> Any:
        done = wg.atomic_add(ones, into=work.total(i))
        wg.map("fill", 0.0, into=ones)
        return done

    with pytest.raises(Race, match=r"race on ones: nothing orders atomic_add\(ones"):
        run(kernel(overwrite, copy="tma"))


# Races.


@COPIES
def test_additions_do_not_race_with_each_other(copy: str) -> None:
    launched, _ = run(kernel(add, copy=copy), latencies=SLOW)
    assert launched.order_matters == {"total"}


@COPIES
@pytest.mark.parametrize("which", [0, 1, CTAS - 1])
def test_an_addition_races_with_a_plain_store(copy: str, which: int) -> None:
    """Whichever CTA it is, and whoever comes first."""
    with pytest.raises(Race, match=r"race on total of batch 0, head 0: nothing orders .* before "):
        run(kernel(only(which, plain, add), copy=copy))


@pytest.mark.parametrize("which", [0, CTAS - 1])
def test_an_addition_races_with_a_load(which: int) -> None:
    def load(wg: Warpgroup, work: WorkTile, i: int, ones: Any) -> Any:
        return wg.load(work.total(i), into=ones)

    with pytest.raises(Race, match="race on total"):
        run(kernel(only(which, load, add)))


def test_stores_race_with_each_other() -> None:
    """As additions do not."""
    with pytest.raises(Race, match="race on total"):
        run(kernel(plain))


def test_an_addition_to_other_columns_than_a_store_s_is_no_race() -> None:
    def left(wg: Warpgroup, work: WorkTile, i: int, ones: Any) -> None:
        wg.store(ones.columns(0, D // 2), into=work.total(i).columns(0, D // 2))

    def right(wg: Warpgroup, work: WorkTile, i: int, ones: Any) -> None:
        wg.atomic_add(ones.columns(0, D // 2), into=work.total(i).columns(D // 2, D // 2))

    launched, total = run(kernel(only(1, left, right)))
    assert np.all(total[..., : D // 2] == 1)
    assert np.all(total[..., D // 2 :] == CTAS - 1)
    assert launched.order_matters == {"total"}


def test_where_one_cta_adds_the_order_does_not_matter() -> None:
    launched, total = run(kernel(only(2, add)))
    assert launched.order_matters == frozenset()
    assert np.all(total == 1)


def test_where_each_cta_adds_to_columns_of_its_own_the_order_does_not_matter() -> None:
    def own(wg: Warpgroup, work: WorkTile, i: int, ones: Any) -> None:
        columns = number_of(work) * D // CTAS, D // CTAS
        wg.atomic_add(ones.columns(*columns), into=work.total(i).columns(*columns))

    launched, total = run(kernel(own), latencies=SLOW)
    assert launched.order_matters == frozenset()
    assert np.all(total == 1)


def test_two_additions_of_one_warpgroup_come_in_order() -> None:
    def twice(wg: Warpgroup, work: WorkTile, i: int, ones: Any) -> None:
        for _ in range(2):
            wg.atomic_add(ones, into=work.total(i))

    launched, total = run(kernel(only(0, twice)), latencies=SLOW)
    assert (launched.order_matters, total.min(), total.max()) == (frozenset(), 2, 2)


# What cannot be said.


@pytest.mark.parametrize(
    ("say", "message"),
    [
        (lambda wg, work, i, ones: wg.atomic_add(ones, into=work.Q(i)), "writes over an input"),
        (
            lambda wg, work, i, ones: wg.atomic_add(ones, into=work.total(i).rows(0, 8)),
            r"atomic_add of \(64, 32\) into \(8, 32\): shapes do not fit",
        ),
        (
            lambda wg, work, i, ones: wg.atomic_add(work.total(i), into=work.total(i)),
            "atomic_add goes from the SM to HBM",
        ),
        (lambda wg, work, i, ones: wg.atomic_add(ones, into=ones), "atomic_add goes from the SM to HBM"),
    ],
    ids=["an input", "shapes", "from HBM", "to registers"],
)
def test_what_no_addition_can_be(say: Say, message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        run(kernel(say))


# What it costs.


@COPIES
@pytest.mark.parametrize("functional", [True, False])
def test_without_l2_an_addition_is_a_read_and_a_write(copy: str, functional: bool) -> None:
    launched, _ = run(kernel(add, copy=copy), device(l2_byte=0), functional=functional)
    assert dict(launched.read_byte) == {"total": CTAS * TOTAL_BYTE}
    assert dict(launched.written_byte) == {"total": CTAS * TOTAL_BYTE}


@COPIES
def test_with_l2_each_tile_is_read_once_and_written_once(copy: str) -> None:
    launched, _ = run(kernel(add, copy=copy))
    assert dict(launched.read_byte) == dict(launched.written_byte) == {"total": TOTAL_BYTE}


def test_a_store_writes_and_reads_nothing() -> None:
    launched, _ = run(kernel(only(0, plain)), device(l2_byte=0))
    assert (dict(launched.read_byte), dict(launched.written_byte)) == ({}, {"total": TOTAL_BYTE})


def test_additions_pass_the_port_a_sector_at_a_time_from_registers_and_once_from_shared_memory() -> None:
    """Apart from the tile that is filled, which passes the port once in each CTA."""
    on = device()
    smem = Costs(on, 1000).smem
    tile_byte, additions = M * D * 4, CTAS * BLOCKS
    filled = CTAS * smem(tile_byte)
    by_red, by_tma = (run(kernel(add, copy=copy), on)[0].busy["smem"] for copy in ("cp.async", "tma"))
    assert by_red - filled == additions * ticks(tile_byte / RED_BYTE_PER_CLK)
    assert by_tma - filled == additions * smem(tile_byte)
    assert by_red - filled == 4 * (by_tma - filled)


def test_l2_adds_at_its_rate_and_hbm_at_its_own() -> None:
    on = device(l2_byte=0)
    launched, _ = run(kernel(add), on)
    costs, m = Costs(on, 1000), on.memory
    tile_byte, additions = M * D * 4, CTAS * BLOCKS
    assert launched.busy["l2"] == additions * costs.byte_rate(m.l2_byte_per_ns)(tile_byte)
    assert launched.busy["hbm"] == 2 * additions * costs.byte_rate(m.hbm_byte_per_ns)(tile_byte)


@COPIES
def test_an_addition_takes_its_time(copy: str) -> None:
    """A kernel that adds is slower than one that does nothing, by the port's work of one CTA at least."""
    adds, nothing = (run(kernel(say, copy=copy))[0].ticks for say in (add, only(-1, add)))
    work = BLOCKS * M * D * 4 / (RED_BYTE_PER_CLK if copy == "cp.async" else 128)
    assert adds - nothing >= ticks(work)
