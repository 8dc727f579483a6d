"""`pack_gqa`: the query heads that share a KV head in one tile; the same numbers, and less of K and V is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashsim.check.example import Latencies
from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import InputError
from flashsim.machine.options import Options
from flashsim.numerics.functional import run_tensors
from flashsim.numerics.inputs import random_inputs
from flashsim.problem import AttentionProblem
from flashsim.result import Result
from flashsim.schedules import load_schedule
from flashsim.simulate import configured, run_kernels, simulate

EXACT = 1e-9
SCHEDULES: dict[str, dict[str, Any]] = {
    "fa2": {"BLOCK_M": 64, "BLOCK_N": 32},
    "fa3": {"BLOCK_M": 64, "BLOCK_N": 32},
    "split_kv": {"BLOCK_M": 64, "BLOCK_N": 32, "num_splits": 2},
}
EACH = pytest.mark.parametrize("schedule", SCHEDULES)
MASKS = ("full", "causal", "window:20,5", "documents:10+3+31", "padding:44,9", "varlen:44,0")


def device(name: str = "h100-sxm5", sms: int = 2, l2_byte: int = 1 << 30) -> DeviceSpec:
    found = load_device(name)
    return replace(
        found, sm=replace(found.sm, count=sms), memory=replace(found.memory, l2_share_byte=l2_byte)
    )  # fmt: skip


def problem(**fields: Any) -> AttentionProblem:
    sizes = {"batch": 2, "heads_q": 6, "heads_kv": 2, "seqlen_q": 44, "head_dim": 32, "head_dim_v": 24}
    return AttentionProblem(**sizes | fields)


def tensors(p: AttentionProblem, schedule: str, latencies: Latencies | None = None, **options: Any) -> dict[str, Any]:
    on, kind = device(), load_schedule(schedule)
    found = run_tensors(p, *random_inputs(p, 5))
    chosen = configured(kind, p, on, SCHEDULES[schedule] | options)
    run_kernels(p, chosen, on, 1500, Options(draw=latencies.draw() if latencies else None, tensors=found))
    return found


@EACH
@pytest.mark.parametrize("mask", MASKS)
def test_the_same_output_as_without(schedule: str, mask: str) -> None:
    p = problem(mask=mask)
    packed, plain = (tensors(p, schedule, pack_gqa=packs) for packs in (True, False))
    for name in ("O", "LSE"):
        assert packed[name].shape == plain[name].shape
        same = packed[name] == plain[name]  # -inf, too
        assert np.all(same | (np.abs(np.where(same, 0, packed[name]) - np.where(same, 0, plain[name])) <= EXACT))
    for name in ("Q", "K", "V"):
        assert np.array_equal(packed[name], plain[name])


@EACH
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (5, 1), (16, 2)], ids=str)
@pytest.mark.parametrize("seqlens", [(1, 40), (9, 64), (70, 33)], ids=str)
def test_exact(schedule: str, heads: tuple[int, int], seqlens: tuple[int, int]) -> None:
    p = problem(batch=1, heads_q=heads[0], heads_kv=heads[1], seqlen_q=seqlens[0], seqlen_k=seqlens[1], mask="causal")
    options = SCHEDULES[schedule] | {"pack_gqa": True}
    found = simulate(p, schedule, device(), options=options, functional=True).functional
    assert found is not None
    assert found.accepted


@EACH
def test_exact_whatever_the_latencies(schedule: str) -> None:
    p = problem(mask="causal")
    slow = Latencies(tuple((kind, "random") for kind in ("memory", "link", "tensor", "barrier", "smem")), 7)
    there, elsewhere = tensors(p, schedule, pack_gqa=True), tensors(p, schedule, slow, pack_gqa=True)
    assert np.array_equal(there["O"], elsewhere["O"])


def run(p: AttentionProblem, schedule: str, packs: bool, full: bool = True, **on: int) -> Result:
    return simulate(p, schedule, device(**on), options=SCHEDULES[schedule] | {"pack_gqa": packs}, full=full)


@EACH
@pytest.mark.parametrize("full", [True, False], ids=["full", "fast"])
def test_without_l2_k_and_v_are_read_for_each_tile_of_packed_rows(schedule: str, full: bool) -> None:
    """44 rows of 3 heads are 132: three tiles of 64 rows for each KV head, packed, and three without, one a head. With
    40 rows, 120, it is two for three. Of Q, O and LSE as much as ever."""
    for seqlen_q, tiles in ((44, 3), (40, 2)) if full else ((40, 2),):
        p = problem(seqlen_q=seqlen_q, seqlen_k=200)
        kv = 2 * 2 * 200 * 2
        packed, plain = (
            {n: (t.read, t.written) for n, t in run(p, schedule, packs, full, l2_byte=0).hbm_bytes.tensors.items()}
            for packs in (True, False)
        )
        assert (packed["K"], packed["V"]) == ((tiles * kv * 32, 0), (tiles * kv * 24, 0))
        assert (plain["K"], plain["V"]) == ((3 * kv * 32, 0), (3 * kv * 24, 0))
        others = packed.keys() - {"K", "V"}
        assert {name: packed[name] for name in others} == {name: plain[name] for name in others}


def test_decoding_with_packed_heads_is_faster() -> None:
    """One query of 8 heads that share a KV head fills a row of a tile without, 8 with; K and V are read once for 8."""
    p = problem(batch=4, heads_q=16, heads_kv=2, seqlen_q=1, seqlen_k=1000, head_dim=64, head_dim_v=64)
    packed, plain = (run(p, "split_kv", packs) for packs in (True, False))
    assert packed.ticks < 0.5 * plain.ticks
    assert packed.flops == plain.flops
    assert packed.flops_executed * 8 == plain.flops_executed


@EACH
def test_heads_that_share_nothing_are_left_as_they_are(schedule: str) -> None:
    p = problem(heads_kv=6)
    packed, plain = (run(p, schedule, packs) for packs in (True, False))
    assert packed.ticks == plain.ticks
    assert packed.hbm_bytes == plain.hbm_bytes
    assert packed.options["pack_gqa"]


@EACH
def test_the_result_is_that_of_the_problem_that_was_asked_for(schedule: str) -> None:
    p = problem(mask="causal")
    result = run(p, schedule, packs=True)
    assert result.problem == {name: getattr(p, name) for name in result.problem}
    assert result.flops == p.flops
    assert result.flops_executed >= p.flops


@pytest.mark.parametrize(
    ("schedule", "fields"),
    [
        ("fa2", {"direction": "bwd"}),
        ("fa2", {"direction": "fwd+bwd"}),
        ("fa2", {"dropout": 0.1}),
        ("fa3", {"dtype": "fp8"}),
    ],
)
def test_what_it_is_not_for(schedule: str, fields: dict[str, Any]) -> None:
    line = f"schedule {schedule}: pack_gqa is for a forward pass in 16 bits, without dropout"
    with pytest.raises(InputError) as error:
        simulate(problem(**fields), schedule, device(), options={"pack_gqa": True})
    assert error.value.problems == (line,)
    if schedule == "fa2":  # heads that share nothing are not packed
        simulate(problem(**fields, heads_kv=6), schedule, device(), options={"pack_gqa": True}, full=True)
