"""`deterministic`: CTAs add to dQ one after the other, so that no latency changes a bit; and what that costs."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

from flashsim.check.equivalent import source_of
from flashsim.check.example import Example, Latencies, NotAccepted
from flashsim.check.survey import _load, _with_part
from flashsim.devices import DeviceSpec, load_device
from flashsim.engine import Simulation
from flashsim.errors import Deadlock
from flashsim.machine.options import Options
from flashsim.machine.order import SharedCounters
from flashsim.machine.tiles import Coordinates, WorkTile
from flashsim.numerics.functional import run_tensors
from flashsim.numerics.inputs import random_do, random_inputs
from flashsim.problem import AttentionProblem, allowed
from flashsim.schedules import Grid, Kernel, Schedule, load_schedule
from flashsim.schedules.fa2_backward import FA2Backward
from flashsim.simulate import configured, run_kernels, simulate
from flashsim.testing.cases import AttentionCase

PROBLEM = AttentionProblem(
    batch=1, heads_q=2, heads_kv=1, seqlen_q=200, seqlen_k=330, head_dim=32, direction="bwd", mask="causal"
)
TILE = {"bwd_BLOCK_M": 64, "bwd_BLOCK_N": 64}
DRAWS = [
    Latencies((("memory", "random"), ("link", "random"), ("smem", "random")), 1),
    Latencies((("tensor", "random"), ("exp", "random"), ("barrier", "random")), 2),
    Latencies((("memory", "far beyond"),), 3),
    Latencies((("smem", "far beyond"), ("issue", "zero")), 4),
    Latencies((("link", "far beyond"), ("memory", "zero")), 5),
]
GRADIENTS = ("dQ", "dK", "dV")


class Found(NamedTuple):
    gradients: dict[str, Any]
    order_matters: set[str]


def device(name: str = "a100-sxm4-80gb", sms: int = 3) -> DeviceSpec:
    found = load_device(name)
    return replace(found, sm=replace(found.sm, count=sms))


def compute(problem: AttentionProblem, latencies: Latencies | None, deterministic: bool) -> Found:
    fa2, on = load_schedule("fa2"), device()
    tensors = run_tensors(problem, *random_inputs(problem, 1), random_do(problem, 1))
    chosen = configured(fa2, problem, on, TILE | {"deterministic": deterministic})
    settings = Options(draw=latencies.draw() if latencies else None, tensors=tensors)
    runs = run_kernels(problem, chosen, on, 1410, settings)
    matters = set[str]().union(*(run.order_matters for run in runs))
    return Found({name: tensors[name] for name in GRADIENTS}, matters)


@cache
def at_hardware(deterministic: bool) -> Found:
    return compute(PROBLEM, None, deterministic)


# What comes out.


@pytest.mark.parametrize("latencies", DRAWS, ids=str)
def test_no_latency_changes_a_bit(latencies: Latencies) -> None:
    there, elsewhere = at_hardware(deterministic=True), compute(PROBLEM, latencies, deterministic=True)
    assert there.order_matters == elsewhere.order_matters == set()
    for name in GRADIENTS:
        assert np.array_equal(there.gradients[name], elsewhere.gradients[name])


def test_without_it_the_order_matters_and_latencies_change_bits_of_dq_alone() -> None:
    there = at_hardware(deterministic=False)
    assert there.order_matters == {"dQ_accum"}
    others = [compute(PROBLEM, latencies, deterministic=False) for latencies in DRAWS]
    assert any(not np.array_equal(there.gradients["dQ"], other.gradients["dQ"]) for other in others)
    for name in ("dK", "dV"):
        assert all(np.array_equal(there.gradients[name], other.gradients[name]) for other in others)


@pytest.mark.parametrize("latencies", [Latencies(), DRAWS[2]], ids=str)
def test_turns_come_in_the_order_of_the_blocks_of_keys(latencies: Latencies) -> None:
    """Of each head and block of queries; each block of keys has two warpgroups, which have their turn together."""
    logged = changed("yield s.order.turn(tile, i)", "yield s.order.turn(tile, i); LOG.append((tile, i))")
    log: list[tuple[WorkTile, int]] = []
    vars(sys.modules[logged.backward.__module__])["LOG"] = log  # type: ignore[attr-defined]
    replace(example(logged), latencies=latencies).check()
    turns: dict[tuple[int, ...], list[int]] = {}
    for tile, i in log:
        turns.setdefault((tile.where.head, tile.block(i)), []).append(tile.where.block)
    runs = 2 if latencies.modes else 1
    for (_, block), found in turns.items():
        blocks = range((330 - 200 + min(200, 64 * block + 64) - 1) // 64 + 1)  # which its last query sees
        assert found == [n for n in blocks for _ in range(2)] * runs
    assert len(turns) == 2 * 4


@pytest.mark.parametrize("mask", ["full", "window:70,20", "documents:64+10+126", "padding:330,100", "varlen:200,0"])
def test_exact_under_masks_that_let_blocks_of_keys_skip_blocks_of_queries(mask: str) -> None:
    seqlen_k = 330 if mask == "full" or mask.startswith(("window", "padding")) else 200
    problem = replace(PROBLEM, batch=2, seqlen_k=seqlen_k, mask=mask)
    options = TILE | {"deterministic": True}
    found = simulate(problem, "fa2", device(), options=options, functional=True, draw=DRAWS[0].draw()).functional
    assert found is not None
    assert found.accepted


# Whom a work tile waits for.


@pytest.mark.parametrize("mask", ["full", "causal", "window:70,20", "documents:64+10+126", "varlen:200,70"])
def test_a_work_tile_waits_for_those_before_it_that_see_the_same_queries(mask: str) -> None:
    """Of each head its own; counted pair by pair."""
    problem = replace(PROBLEM, batch=2, seqlen_k=200, mask=mask)
    kernel = Kernel("k", (), lambda cta: None, Grid(over="keys"), BLOCK_M=64, BLOCK_N=32, mma="mma.sync",
                    copy="cp.async")  # fmt: skip
    counters = SharedCounters(Simulation())
    seen = np.array([allowed(problem, np.arange(200), np.arange(224), batch) for batch in range(2)])
    semaphores = {}
    for batch, head, block in np.ndindex(2, 2, 7):
        tile = WorkTile(problem, kernel, Coordinates(block, head, batch), 0, 0)
        for i in range(tile.count):
            semaphore, before = counters.of("dQ", tile, i, each=2)
            rows = seen[batch, tile.block(i) * 64 : tile.block(i) * 64 + 64]
            assert before == sum(rows[:, n * 32 : n * 32 + 32].any() for n in range(block))
            assert semaphores.setdefault((batch, head, tile.block(i)), semaphore) is semaphore
            assert semaphore.each == 2
    assert len({id(semaphore) for semaphore in semaphores.values()}) == len(semaphores)


# Without the turn, and without passing it on.


def changed(old: str, new: str) -> type[Schedule]:
    """fa2 with one statement of its backward pass replaced."""
    text = source_of(FA2Backward)
    assert text.count(old) == 1
    return _with_part(load_schedule("fa2"), FA2Backward, _load(text.replace(old, new), FA2Backward))


def example(schedule: type[Schedule]) -> Example:
    options = TILE | {"deterministic": True}
    return Example(schedule, "a100-sxm4-80gb", 3, options, AttentionCase(PROBLEM), DRAWS[0])


def test_the_schedule_as_it_is_passes_the_check() -> None:
    example(load_schedule("fa2")).check()


def test_who_does_not_pass_on_lets_the_next_one_wait_for_ever() -> None:
    with pytest.raises(Deadlock, match=r"parties at dQ of batch 0, head 0 \(\d+ of \d+ arrivals\), at .*fa2_backward"):
        example(changed("s.order.pass_on(tile, i)", "pass")).run()


def test_passing_on_for_another_block_is_noticed() -> None:
    with pytest.raises(Deadlock, match="parties at dQ"):
        example(changed("s.order.pass_on(tile, i)", "s.order.pass_on(tile, tile.last)")).run()


def test_who_waits_for_no_turn_is_not_deterministic() -> None:
    with pytest.raises(NotAccepted, match="it is to be deterministic, and something is summed in an order"):
        example(changed("yield s.order.turn(tile, i)", "pass")).run()


def test_a_turn_that_is_passed_on_before_the_addition_is_none() -> None:
    """Another warpgroup may then add before."""
    with pytest.raises(NotAccepted, match="it is to be deterministic"):
        example(changed("yield s.order.turn(tile, i)", "yield s.order.turn(tile, i); s.order.pass_on(tile, i)")).run()


# What it costs.


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_turns_cost_time_and_the_fast_path_knows(mask: str) -> None:
    problem = AttentionProblem(batch=1, heads_q=2, seqlen_q=768, head_dim=64, direction="bwd", mask=mask)
    ticks = {}
    for deterministic in (False, True):
        for full in (False, True):
            options = {"deterministic": deterministic}
            ticks[deterministic, full] = simulate(problem, "fa2", device(), options=options, full=full).ticks
        assert ticks[deterministic, False] == pytest.approx(ticks[deterministic, True], rel=0.03)
    assert ticks[True, True] > 1.005 * ticks[False, True]
    assert ticks[True, False] > 1.005 * ticks[False, False]


def test_numbers_take_no_time_with_turns_either() -> None:
    options = TILE | {"deterministic": True}
    with_numbers = simulate(PROBLEM, "fa2", device(), options=options, functional=True)
    assert with_numbers.ticks == simulate(PROBLEM, "fa2", device(), options=options, full=True).ticks
