"""What a simulation costs, and what the two builds of FA3 differ in."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flashsim.devices import DeviceSpec, load_device
from flashsim.problem import AttentionProblem
from flashsim.result import Result
from flashsim.simulate import simulate


def with_sms(name: str, count: int) -> DeviceSpec:
    device = load_device(name)
    return dataclasses.replace(device, sm=dataclasses.replace(device.sm, count=count))


@pytest.mark.parametrize(
    ("schedule", "mask", "events"),
    [("fa2", "full", 0), ("fa2", "causal", 0), ("fa3", "full", 0), ("fa3", "causal", 0)],
)
def test_events_of_a_small_case(schedule: str, mask: str, events: int) -> None:
    """Events are the cost of an answer: who changes how many a KV tile takes changes this number, and says why."""
    problem = AttentionProblem(batch=1, heads_q=4, heads_kv=2, seqlen_q=512, seqlen_k=1024, head_dim=128, mask=mask)
    result = simulate(problem, schedule, with_sms("h100-sxm5", 2), full=True)
    assert result.events == events


def time_of(build: str, mask: str, **options: Any) -> Result:
    problem = AttentionProblem(batch=1, heads_q=4, seqlen_q=1024, seqlen_k=2048, head_dim=128, mask=mask)
    settings = {"build": build, **options}
    return simulate(problem, "fa3", with_sms("h100-sxm5", 4), clock_mhz=1500, options=settings, full=True)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_the_later_build_of_fa3_is_faster_at_head_dim_128(mask: str) -> None:
    """Tiles are the same; O is rescaled after the softmax, not between the two products, and the first QK needs no turn."""
    early, late = time_of("2024-07", mask), time_of("2025-01", mask)
    assert early.tile == late.tile
    assert late.ticks < early.ticks


@pytest.mark.parametrize("switch", ["warp_specialized", "intra_wg_overlap", "pingpong"])
def test_each_idea_of_fa3_saves_time(switch: str) -> None:
    """Paper, section 4.2: 570 TFLOP/s without warp specialization, 582 without the overlap, 661 with both."""
    assert time_of("2024-07", "full").ticks < time_of("2024-07", "full", **{switch: False}).ticks
