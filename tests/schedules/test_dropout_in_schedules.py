"""Dropout in FlashAttention-2: the same bits forward and backward, what it costs, and who has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashsim.check.equivalent import source_of
from flashsim.check.survey import _load, _with_part
from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import InputError
from flashsim.machine.costs import DROPOUT_INSTRUCTIONS, MAP_COUNT
from flashsim.machine.options import Options
from flashsim.numerics.functional import run_tensors
from flashsim.numerics.philox import keep
from flashsim.problem import AttentionProblem
from flashsim.result import Functional
from flashsim.schedules import Schedule
from flashsim.schedules.fa2 import FA2
from flashsim.schedules.fa2_backward import FA2Backward
from flashsim.simulate import configured, run_kernels, simulate
from flashsim.units import ticks

EXACT = 1e-9
A100, H100, L4 = "a100-sxm4-80gb", "h100-sxm5", "l4"
SMALL = {"BLOCK_M": 64, "BLOCK_N": 32, "bwd_BLOCK_M": 64, "bwd_BLOCK_N": 64}
TWO_WARPGROUPS = SMALL | {"BLOCK_M": 256}


def device(name: str = A100, sms: int = 2) -> DeviceSpec:
    found = load_device(name)
    return replace(found, sm=replace(found.sm, count=sms))


def problem(**fields: Any) -> AttentionProblem:
    sizes = {"batch": 2, "heads_q": 4, "heads_kv": 2, "seqlen_q": 130, "seqlen_k": 150, "head_dim": 32}
    return AttentionProblem(**sizes | {"dropout": 0.17, "direction": "fwd+bwd"} | fields)


def judged(p: AttentionProblem, schedule: str | type[Schedule] = "fa2", gpu: str = A100, **settings: Any) -> Functional:
    found = simulate(p, schedule, device(gpu), **{"functional": True, "options": SMALL} | settings).functional
    assert found is not None
    return found


@pytest.mark.parametrize("mask", ["full", "causal", "window:30,9", "padding:150,33"])
@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
def test_exact_with_the_bits_of_the_reference(direction: str, mask: str) -> None:
    found = judged(problem(mask=mask, direction=direction, heads_q=2, heads_kv=1))
    assert found.accepted
    assert found.max_abs_error <= EXACT
    assert max((found.gradient_max_abs_error or {"": 0.0}).values()) <= EXACT


@pytest.mark.parametrize("p", [0.001, 0.5, 0.97])
def test_exact_whatever_the_probability(p: float) -> None:
    """At 0.97 some rows lose all their keys."""
    assert judged(problem(dropout=p, batch=1)).accepted


@pytest.mark.parametrize(("gpu", "head_dim"), [(A100, 64), (H100, 128), (L4, 64), (A100, 256)])
def test_published_tiles_are_exact(gpu: str, head_dim: int) -> None:
    p = problem(batch=1, heads_q=2, heads_kv=1, head_dim=head_dim, mask="causal")
    assert judged(p, gpu=gpu, options={}).accepted


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_run_that_rounds_is_accepted(dtype: str) -> None:
    assert judged(problem(batch=1, dtype=dtype, head_dim=64), functional="dtype").accepted


def test_what_is_dropped_follows_from_the_place_alone() -> None:
    """With uniform P, V one-hot and dO all ones, O counts kept keys and dV kept queries, whatever the tiles are."""
    p = problem(batch=1, heads_q=2, heads_kv=2, seqlen_q=100, seqlen_k=90, head_dim=96)
    q, k = np.zeros((1, 100, 2, 96)), np.zeros((1, 90, 2, 96))
    v = np.broadcast_to(np.eye(90, 96)[None, :, None], (1, 90, 2, 96)).copy()
    kept = np.array([keep(np.arange(100), np.arange(90), 0, head, p.dropout) for head in range(2)])
    for options in (SMALL, {"BLOCK_M": 128, "BLOCK_N": 64, "bwd_BLOCK_M": 64, "bwd_BLOCK_N": 128}):
        tensors = run_tensors(p, q, k, v, np.ones((1, 100, 2, 96)))
        chosen = configured(FA2, p, device(), options)
        run_kernels(p, chosen, device(), 1410, Options(tensors=tensors))
        times = 90 * (1 - p.dropout)
        np.testing.assert_allclose(tensors["O"][0, :, :, :90].swapaxes(0, 1), kept / times, atol=EXACT)
        np.testing.assert_allclose(tensors["dV"][0, :, :, 0].T, kept.sum(axis=1) / times, atol=EXACT)


# Mistakes.


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [
        (FA2, 'wg.map("dropout", r.S, tile, j, into=r.S)', "pass"),
        (FA2, 'wg.map("dropout", r.S, tile, j, into=r.S)', 'wg.map("dropout", r.S, tile, j, 0, into=r.S)'),
        (FA2, 'wg.map("dropout", r.S, tile, j, into=r.S)', 'wg.map("dropout", r.S, tile, tile.last, into=r.S)'),
        (FA2Backward, 'wg.map("dropout", r.dP, *place, into=r.dP)', "pass"),
        (FA2Backward, 'wg.map("dropout", r.S, *place, into=r.dP)', 'wg.map("copy", r.S, into=r.dP)'),
        (FA2Backward, 'wg.map("dropout", r.S, *place, into=r.dP)', 'wg.map("dropout", r.S, tile, i, into=r.dP)'),
        (
            FA2Backward,
            'wg.map("dropout", r.S, *place, into=r.dP)',
            'wg.map("dropout", r.S, *place, into=r.S); wg.map("copy", r.S, into=r.dP)',
        ),
    ],
    ids=["no dropout", "rows of the first warps", "other keys", "dP not dropped", "P not dropped",
         "columns of the first warps", "dS with dropped P"],
)  # fmt: skip
def test_a_wrong_variant_is_noticed(part: type, old: str, new: str) -> None:
    """fa2 with one piece of a pass replaced."""
    text = source_of(part)
    assert text.count(old) == 1
    schedule = _with_part(FA2, part, _load(text.replace(old, new), part))
    assert not judged(problem(batch=1), schedule, options=TWO_WARPGROUPS).accepted


def test_as_it_is_it_is_right() -> None:
    assert judged(problem(batch=1), options=TWO_WARPGROUPS).accepted


# What it costs.


def test_the_alu_computes_the_random_bits() -> None:
    """In the forward pass for each element of S, in the backward pass twice, of all tiles."""
    sizes = {"batch": 1, "heads_q": 1, "heads_kv": 1, "seqlen_q": 512, "seqlen_k": 512, "head_dim": 64}
    on = device()
    per_clk = on.pipes.alu_op_per_clk
    for direction, passes in (("fwd", 1), ("bwd", 2)):
        options = {"BLOCK_M": 128, "BLOCK_N": 64}
        found = {
            dropout: simulate(
                problem(**sizes, direction=direction, dropout=dropout), "fa2", on, options=options, full=True
            )
            for dropout in (0.0, 0.1)
        }
        busy = {
            dropout: result.utilization["alu"].elapsed * result.ticks * on.sm.count for dropout, result in found.items()
        }
        work = passes * 512 * 512 * DROPOUT_INSTRUCTIONS
        assert busy[0.1] - busy[0.0] == pytest.approx(ticks(work / per_clk))
        assert found[0.1].ticks > 1.05 * found[0.0].ticks
        assert found[0.1].flops == found[0.0].flops
    assert MAP_COUNT["dropout"].alu == DROPOUT_INSTRUCTIONS


def test_the_probability_is_no_matter_of_time() -> None:
    """With the same tiles: flash-attn has smaller ones with dropout."""
    rare, often = (
        simulate(problem(dropout=p, direction="fwd"), "fa2", device(), options=SMALL, full=True).ticks
        for p in (0.1, 0.9)
    )
    assert rare == often
    tiles = [
        simulate(problem(dropout=p, direction="fwd", head_dim=128), "fa2", device(), full=True).tile for p in (0, 0.1)
    ]
    assert [tile["BLOCK_N"] for tile in tiles] == [64, 32]


def test_the_fast_path() -> None:
    p = problem(batch=1, seqlen_q=1024, seqlen_k=1024, head_dim=64, direction="fwd")
    fast, full = (simulate(p, "fa2", device(sms=4), full=full).ticks for full in (False, True))
    assert fast == pytest.approx(full, rel=0.05)


# Who has none.


@pytest.mark.parametrize("schedule", ["fa3", "split_kv"])
def test_schedules_without_dropout_say_so(schedule: str) -> None:
    with pytest.raises(InputError, match=f"^schedule {schedule} has no dropout, got 0.17$"):
        simulate(problem(direction="fwd"), schedule, device(H100))


def test_a_user_s_schedule_has_none_unless_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    assert source_of(FA2).count("    dropout = True\n") == 1
    path.write_text(source_of(FA2).replace("    dropout = True\n", ""), encoding="utf-8")
    with pytest.raises(InputError, match="schedule fa2 has no dropout"):
        simulate(problem(), f"{path}:FA2", device())
