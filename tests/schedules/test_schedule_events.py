"""What a simulation of the schedules costs, and that the two builds of FA3 differ as they do on hardware."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from flashsim.devices import DeviceSpec, load_device
from flashsim.problem import AttentionProblem
from flashsim.result import Result
from flashsim.schedules import fa2
from flashsim.simulate import simulate


def with_sms(name: str, count: int) -> DeviceSpec:
    device = load_device(name)
    return dataclasses.replace(device, sm=dataclasses.replace(device.sm, count=count))


@pytest.mark.parametrize(
    ("schedule", "mask", "events"),
    [("fa2", "full", 29475), ("fa2", "causal", 24005), ("fa3", "full", 4710), ("fa3", "causal", 5074)],
)
def test_events_of_a_small_case(schedule: str, mask: str, events: int) -> None:
    """Events are the cost of an answer: who changes how many a KV tile takes changes this number, and says why."""
    problem = AttentionProblem(batch=1, heads_q=4, heads_kv=2, seqlen_q=512, seqlen_k=1024, head_dim=128, mask=mask)
    result = simulate(problem, schedule, with_sms("h100-sxm5", 2), full=True)
    assert result.events == events


def run_of(build: str, mask: str) -> Result:
    problem = AttentionProblem(batch=1, heads_q=4, seqlen_q=1024, seqlen_k=2048, head_dim=128, mask=mask)
    return simulate(problem, "fa3", with_sms("h100-sxm5", 4), clock_mhz=1500, options={"build": build}, full=True)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_the_later_build_of_fa3_is_faster_at_head_dim_128(mask: str) -> None:
    """Tiles are the same; O is rescaled after the softmax, not between the products, and the first QK needs no turn."""
    early, late = run_of("2024-07", mask), run_of("2025-01", mask)
    assert early.tile == late.tile
    assert late.ticks < early.ticks


def test_an_operation_on_one_row_costs_the_same_before_and_after_one_on_all_rows(tmp_path: Path) -> None:
    text = Path(fa2.__file__).read_text(encoding="utf-8")
    one = 'wg.map("exp", r.S.rows(0, 1), r.stats.m.rows(0, 1), into=r.S.rows(0, 1)); yield q'
    whole = 'wg.map("exp", r.S, r.stats.m, into=r.S); yield q'
    assert text.count("yield q\n") == 1
    problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=128, seqlen_k=128, head_dim=64)
    ticks = []
    for number, order in enumerate((f"{one}; {whole}", f"{whole}; {one}")):
        path = tmp_path / f"order_{number}.py"
        path.write_text(text.replace("yield q\n", f"yield q; {order}\n"), encoding="utf-8")
        ticks.append(simulate(problem, f"{path}:FA2", with_sms("h100-sxm5", 1), full=True).ticks)
    assert ticks[0] == ticks[1]
