"""FlashAttention-3 with three KV tiles under way: exact, slower than with two, and what it needs of registers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flashsim.check.equivalent import source_of
from flashsim.check.example import Latencies
from flashsim.check.survey import _load, _with_part
from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import Infeasible, InputError, SimulationError
from flashsim.problem import AttentionProblem
from flashsim.schedules.fa3 import FA3, keys_of_three_stages
from flashsim.schedules.fa3_three_stages import ThreeStages
from flashsim.simulate import simulate

EXACT = 1e-9
H100 = load_device("h100-sxm5")
SMALL = {"BLOCK_M": 128, "BLOCK_N": 32, "overlap_stages": 3}


def device(sms: int = 1) -> DeviceSpec:
    return replace(H100, sm=replace(H100.sm, count=sms))


def problem(**fields: Any) -> AttentionProblem:
    sizes = {"batch": 1, "heads_q": 2, "heads_kv": 1, "seqlen_q": 150, "seqlen_k": 230, "head_dim": 32}
    return AttentionProblem(**sizes | fields)


def exact(p: AttentionProblem, **settings: Any) -> None:
    found = simulate(p, "fa3", device(), **{"options": SMALL, "functional": True} | settings).functional
    assert found is not None
    assert found.accepted
    assert max(found.max_abs_error, found.lse_max_abs_error) <= EXACT


@pytest.mark.parametrize("mask", ["full", "causal", "window:60,10", "documents:30+3+117", "varlen:150,0"])
def test_exact_under_masks(mask: str) -> None:
    own = mask.startswith(("documents", "varlen"))
    exact(problem(mask=mask, batch=2, seqlen_k=150 if own else 230))


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_exact_for_few_kv_tiles(tiles: int, num_stages: int) -> None:
    """The loop of three begins with the third; one SM, so that the rings go on from one work tile to the next."""
    options = SMALL | {"num_stages": num_stages}
    for seqlen_k in (32 * tiles - 31, 32 * tiles):
        exact(problem(seqlen_q=300, seqlen_k=seqlen_k), options=options)
        exact(problem(seqlen_q=300, seqlen_k=seqlen_k, mask="causal"), options=options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_the_tile_that_it_chooses_fits_and_is_exact(head_dim: int, mask: str) -> None:
    exact(problem(head_dim=head_dim, seqlen_k=500, mask=mask), options={"overlap_stages": 3})


@pytest.mark.parametrize("build", ["2024-07", "2025-01"])
@pytest.mark.parametrize("pingpong", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_whatever_the_latencies(build: str, pingpong: bool, seed: int) -> None:
    slow = Latencies(tuple((kind, "random") for kind in ("memory", "tma", "tensor", "exp", "barrier", "drain")), seed)
    options = SMALL | {"build": build, "pingpong": pingpong}
    exact(problem(mask="causal"), options=options, draw=slow.draw())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_run_that_rounds_is_accepted(dtype: str) -> None:
    found = simulate(problem(dtype=dtype), "fa3", device(), options=SMALL, functional="dtype").functional
    assert found is not None
    assert found.accepted


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rescale(wg, r.O, r.stats)", "pass"),
        ("yield s.V.full(j - 2)", "pass"),
        ("yield pv\n            s.V.release(j - 2)", "s.V.release(j - 2)"),
        ("s.K.release(j)", "s.K.release(j - 1)"),
        ("pv = wg.gemm(r.P, s.V[j - 2]", "pv = wg.gemm(r.P, s.V[j - 1]"),
        ("masked=tile.partial(tile.last)", "masked=False"),
        ("masked=tile.partial(j - 1)", "masked=False"),
        ("into=scores[j % 2])  # S of the tile after", "into=scores[(j + 1) % 2])"),
    ],
)
def test_a_wrong_variant_is_noticed(old: str, new: str) -> None:
    """One piece of it replaced, wherever it stands; with documents, tiles in the middle of a walk are masked, too."""
    text = source_of(ThreeStages)
    assert old in text
    schedule = _with_part(FA3, ThreeStages, _load(text.replace(old, new), ThreeStages))
    accepted = []
    for mask in ("causal", "documents:20+60+150"):
        p = problem(seqlen_q=230, mask=mask)
        try:
            found = simulate(p, schedule, device(), options=SMALL, functional=True).functional
        except SimulationError:
            found = None
        accepted.append(found is not None and found.accepted)
    assert not all(accepted)


# Time.


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_is_slower_than_two_stages(head_dim: int, mask: str) -> None:
    """Appendix B.3: less than with two stages, since tiles are smaller. The same work is done."""
    p = problem(heads_q=16, heads_kv=16, seqlen_q=2048, seqlen_k=2048, head_dim=head_dim, mask=mask)
    two, three = (simulate(p, "fa3", H100, options={"overlap_stages": n}) for n in (2, 3))
    assert 1 < three.ticks / two.ticks < 1.25
    assert three.tile["BLOCK_N"] < two.tile["BLOCK_N"]
    assert three.flops == two.flops


def test_the_fast_path() -> None:
    p = problem(heads_q=4, heads_kv=4, seqlen_q=1024, seqlen_k=1024, head_dim=128)
    fast, full = (
        simulate(p, "fa3", device(4), options={"overlap_stages": 3}, full=full).ticks for full in (False, True)
    )
    assert fast == pytest.approx(full, rel=0.03)


# Registers.


@pytest.mark.parametrize(
    ("head_dim", "mask", "need", "limit"),
    [
        # 24, O d / 2, and for each key two scores and half a P: 1.25 BLOCK_N.
        (64, "causal", 24 + 32 + 160, 160),
        (64, "full", 24 + 32 + 240, 160),
        (128, "causal", 24 + 64 + 160, 240),
        (128, "full", 24 + 64 + 220, 240),
    ],
)
def test_the_tile_of_two_stages_does_not_fit(head_dim: int, mask: str, need: int, limit: int) -> None:
    p = problem(head_dim=head_dim, mask=mask)
    tile = FA3.configure(p, "hopper", {})
    options = {"overlap_stages": 3, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N}
    message = (
        f"fa3_fwd with BLOCK_M = {tile.BLOCK_M}, BLOCK_N = {tile.BLOCK_N} needs {need} registers per thread of a "
        f"consumer (24 of them beside its tiles), the limit is {limit}"
    )
    with pytest.raises(Infeasible) as error:
        simulate(p, "fa3", H100, options=options)
    assert message in error.value.problems


@pytest.mark.parametrize("rows", [64, 128, 192])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_chooses_the_most_keys_that_fit(rows: int, head_dim: int) -> None:
    keys, limit = keys_of_three_stages(rows, head_dim), {64: 255, 128: 240, 192: 160}[rows]
    need = {n: 24 + head_dim / 2 + 1.25 * n for n in (keys, keys + 16)}
    assert keys % 16 == 0
    assert need[keys] <= limit < need[keys + 16]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"overlap_stages": 4}, "overlap_stages = 4, allowed are 2 and 3"),
        ({"num_stages": 1}, "overlap_stages = 3 needs num_stages of at least 2: K runs two tiles ahead of V"),
        *(
            (options, "overlap_stages = 3 needs warp_specialized, intra_wg_overlap, P in registers and 16 bits")
            for options in ({"warp_specialized": False}, {"intra_wg_overlap": False}, {"P_in_shared": True})
        ),
    ],
)
def test_what_it_needs(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        FA3.configure(problem(), "hopper", {"overlap_stages": 3} | options)
    assert error.value.problems == (f"schedule fa3: {line}",)
