"""FlashAttention-3's backward pass: exact in every layout, each wait needed, tiles that fit, the time of a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flashsim.check.equivalent import source_of
from flashsim.check.mutants import Mutant, mutants_of
from flashsim.check.survey import _load, _with_part
from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import InputError, SimulationError
from flashsim.machine.fast import FastSimulation
from flashsim.machine.feasibility import fit
from flashsim.machine.options import Options
from flashsim.problem import AttentionProblem
from flashsim.result import Result
from flashsim.schedules import Schedule, load_schedule
from flashsim.schedules.fa3 import FA3
from flashsim.schedules.fa3_backward import FA3Backward
from flashsim.simulate import run_kernels, simulate

H100 = load_device("h100-sxm5")
SMALL_FORWARD = {"BLOCK_M": 64, "BLOCK_N": 64}


def with_sms(count: int) -> DeviceSpec:
    """So many of an H100's SMs, each with its share of the rest."""
    share = count / H100.sm.count
    memory = dataclasses.replace(
        H100.memory,
        hbm_byte_per_ns=H100.memory.hbm_byte_per_ns * share,
        l2_byte_per_ns=H100.memory.l2_byte_per_ns * share,
        l2_share_byte=int(H100.memory.l2_share_byte * share),
    )
    launch = dataclasses.replace(H100.launch, cta_interval_ns=H100.launch.cta_interval_ns / share)
    return dataclasses.replace(H100, sm=dataclasses.replace(H100.sm, count=count), memory=memory, launch=launch)


def problem(head_dim: int, **fields: Any) -> AttentionProblem:
    sizes = {"batch": 1, "heads_q": 1, "seqlen_q": 150, "direction": "bwd"}
    return AttentionProblem(**sizes | {"head_dim": head_dim} | fields)


def compute(p: AttentionProblem, rounded: bool = False, kind: type[Schedule] = FA3, **options: Any) -> Result:
    settings = SMALL_FORWARD | options
    return simulate(p, kind, with_sms(2), options=settings, functional="dtype" if rounded else True)


def accepted(result: Result) -> bool:
    return result.functional is not None and result.functional.accepted


# Exact.


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("mask", ["full", "causal", "window:40,10", "documents:3+90+57", "padding:77"])
def test_exact_at_every_head_dim(head_dim: int, mask: str) -> None:
    assert accepted(compute(problem(head_dim, mask=mask)))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("direction", ["bwd", "fwd+bwd"])
def test_accepted_in_low_precision(head_dim: int, direction: str) -> None:
    dtype = "bf16" if direction == "bwd" else "fp16"
    assert accepted(compute(problem(head_dim, direction=direction, dtype=dtype), rounded=True))


@pytest.mark.parametrize(
    ("head_dim", "fields", "options"),
    [
        (64, {"heads_q": 4, "heads_kv": 2, "batch": 2, "mask": "causal"}, {}),
        (128, {"heads_q": 3, "heads_kv": 1}, {"bwd_BLOCK_M": 48}),
        (192, {"heads_q": 2, "heads_kv": 1}, {}),
        (256, {"heads_q": 2, "heads_kv": 1, "mask": "causal"}, {}),
        (40, {"head_dim_v": 24}, {"bwd_BLOCK_M": 32}),
        (128, {"head_dim_v": 64, "seqlen_q": 97, "seqlen_k": 301}, {"bwd_BLOCK_M": 16}),
        (64, {"head_dim_v": 160, "seqlen_q": 31, "seqlen_k": 1}, {"bwd_BLOCK_N": 48}),
        (128, {"seqlen_q": 1, "seqlen_k": 300}, {}),
        (16, {"seqlen_q": 193, "seqlen_k": 67, "mask": "causal"}, {"bwd_BLOCK_M": 112}),
        (248, {"head_dim_v": 256, "seqlen_q": 67, "seqlen_k": 129}, {"bwd_BLOCK_N": 16}),
    ],
)
def test_exact_for_groups_of_heads_other_lengths_and_other_tiles(
    head_dim: int, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    assert accepted(compute(problem(head_dim, **fields), **options))


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_keys_that_no_query_sees_have_gradients_of_zero(head_dim: int, heads_kv: int) -> None:
    """Whole blocks of keys lie behind the end of the sequence."""
    p = problem(head_dim, heads_q=2, heads_kv=heads_kv, seqlen_q=40, seqlen_k=400, mask="padding:100")
    assert accepted(compute(p))


# Every wait is needed, and missed.

UNDER_TEST = (
    (problem(64, seqlen_q=97), {"bwd_BLOCK_M": 16}),
    (problem(64, seqlen_k=300), {"deterministic": True}),
    (problem(128, seqlen_q=200, seqlen_k=130), {}),
    (problem(96, seqlen_q=150, heads_q=2, heads_kv=1), {}),
    (problem(192, seqlen_q=200, seqlen_k=100), {}),
    (problem(256, seqlen_q=200, seqlen_k=90), {}),
)
NOT_MISSED = {
    # The code has it. The only slot of dO is loaded again when all have read P, and who writes P has waited for that.
    ("consumer", "yield s.PdS.wait()"),
    # It orders additions of CTAs, which are right in any order; `test_deterministic` misses it.
    ("dq_writer", "yield s.order.turn(tile, i)"),
    # A store from registers has read them when it is issued.
    ("clear", 'yield wg.store(r, into=getattr(tile, f"{name}_accum").rows(wg.index * r.shape[0], r.shape[0]))'),
}


def without_a_wait() -> list[Mutant]:
    text = source_of(FA3Backward)
    return [mutant for mutant in mutants_of(text) if mutant.change in ("removed", "not awaited")]


def is_missed(mutant: Mutant) -> bool:
    changed = _with_part(FA3, FA3Backward, _load(mutant.source, FA3Backward))
    for p, options in UNDER_TEST:
        try:
            if not accepted(compute(p, kind=changed, **options)):
                return True
        except SimulationError:
            return True
    return False


def test_every_wait_and_every_signal_is_missed() -> None:
    mutants = without_a_wait()
    assert len(mutants) > 30
    assert {(m.function, m.statement) for m in mutants if not is_missed(m)} <= NOT_MISSED


def order_matters(p: AttentionProblem, kind: type[Schedule] = FA3, **options: Any) -> bool:
    from flashsim.numerics.functional import run_tensors
    from flashsim.numerics.inputs import random_do, random_inputs

    device = with_sms(3)
    chosen = kind.configure(p, "hopper", SMALL_FORWARD | options)
    tensors = run_tensors(p, *random_inputs(p, 0), random_do(p, 0))
    runs = run_kernels(p, chosen, device, 1830, Options(tensors=tensors))
    return any(run.order_matters for run in runs)


@pytest.mark.parametrize("head_dim", [64, 192])
def test_deterministic(head_dim: int) -> None:
    """The order in which blocks of keys add to dQ depends on time, unless it is asked not to, and without the wait."""
    p = problem(head_dim, seqlen_k=300, mask="window:200,60")
    assert order_matters(p)
    assert not order_matters(p, deterministic=True)
    assert accepted(compute(p, deterministic=True))
    (mutant,) = (m for m in without_a_wait() if m.statement == "yield s.order.turn(tile, i)")
    changed = _with_part(FA3, FA3Backward, _load(mutant.source, FA3Backward))
    assert order_matters(p, changed, deterministic=True)


# Tiles, kernels and memory.


@pytest.mark.parametrize(
    ("head_dim", "mask", "tile", "consumers"),
    [
        (64, "full", (128, 128), 2),
        (64, "causal", (128, 128), 2),
        (96, "full", (64, 128), 2),
        (128, "full", (80, 128), 2),
        (128, "causal", (64, 128), 2),
        (192, "full", (64, 96), 3),
        (256, "full", (64, 80), 2),
    ],
)
def test_the_tiles_of_the_library_fit(head_dim: int, mask: str, tile: tuple[int, int], consumers: int) -> None:
    """One CTA on an SM: shared memory and the registers that setmaxnreg leaves are enough, and no more."""
    p = problem(head_dim, mask=mask)
    kernels = {kernel.name: kernel for kernel in FA3.configure(p, "hopper", {}).kernels(p)}
    main = kernels["fa3_bwd"]
    assert tile == (main.BLOCK_M, main.BLOCK_N)
    assert {role.name: role.count for role in main.roles}["consumer"] == consumers
    assert fit(main, p, H100).ctas_per_sm == 1
    assert [role.name for role in main.roles].count("dQ writer") == (head_dim < 256)


def test_shared_memory_of_the_largest_tile() -> None:
    """K, V, two stages of Q, dO, LSE, D and dS, and dQ: what the code's storage comes to, but for its barriers."""
    p = problem(128)
    main = FA3.configure(p, "hopper", {}).kernels(p)[1]
    tiles = 2 * 128 * 128 * 2 + 4 * 80 * 128 * 2 + 2 * 80 * 128 * 2 + 80 * 128 * 4 + 4 * 80 * 4
    assert 0 <= fit(main, p, H100).smem_byte - tiles < 512


def test_kernels_and_workspace() -> None:
    p = problem(128, heads_q=4, heads_kv=4)
    chosen = FA3.configure(p, "hopper", {})
    assert [kernel.name for kernel in chosen.kernels(p)] == ["fa3_bwd_preprocess", "fa3_bwd", "fa3_bwd_convert_dq"]
    assert chosen.workspace_byte(p) == 4 * 150 * (128 + 1) * 4
    grouped = problem(128, heads_q=4, heads_kv=2, direction="fwd+bwd")
    chosen = FA3.configure(grouped, "hopper", {})
    assert [kernel.name.removeprefix("fa3_") for kernel in chosen.kernels(grouped)] == [
        "fwd",
        "bwd_preprocess",
        "bwd_clear_dv",
        "bwd_clear_dk",
        "bwd",
        "bwd_convert_dq",
        "bwd_convert_dk",
        "bwd_convert_dv",
    ]
    assert chosen.workspace_byte(grouped) == 4 * 150 * (128 + 1) * 4 + 2 * 2 * 150 * 128 * 4


@pytest.mark.parametrize(
    ("fields", "options", "line"),
    [
        ({"head_dim": 264}, {}, "head dim 264, the backward pass has tiles of up to 256 columns"),
        ({"head_dim": 64}, {"bwd_BLOCK_M": 72}, "bwd_BLOCK_M = 72, allowed at head dim 64 are the multiples of 16"),
        ({"head_dim": 96}, {"bwd_BLOCK_M": 80}, "bwd_BLOCK_M = 80, allowed at head dim 96 are the multiples of 64"),
        ({"head_dim": 128}, {"bwd_BLOCK_N": 64}, "bwd_BLOCK_N = 64, allowed at head dim 128: 128"),
        ({"head_dim": 192}, {"bwd_BLOCK_N": 64}, "bwd_BLOCK_N = 64, allowed at head dim 192: 48, 96, 144"),
        ({"head_dim": 256}, {"deterministic": True}, "deterministic is for head dims up to 192"),
        ({"head_dim": 64, "heads_q": 2, "heads_kv": 1}, {"deterministic": True}, "deterministic is for head dims up"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        FA3.configure(problem(**fields), "hopper", options)
    (found,) = (text for text in error.value.problems if "bwd" in text or "backward" in text or "deterministic" in text)
    assert found.startswith(f"schedule fa3: {line}")


# Time.


def test_five_products_are_computed() -> None:
    p = problem(128, seqlen_q=640, seqlen_k=512)
    assert simulate(p, "fa3", with_sms(2)).flops_executed == p.flops


@pytest.mark.parametrize("BLOCK_M", [64, 80])
def test_a_step_takes_no_less_than_its_products_and_no_more_than_they_and_what_they_cannot_hide(BLOCK_M: int) -> None:
    """In cycles of an SM that has its memory for itself. The products of a step take 40 BLOCK_M; of the exponentials,
    the rest of dS and its way through shared memory, a consumer can hide a part only: all that comes to 60 BLOCK_M."""
    p = problem(128, seqlen_q=80 * 64, seqlen_k=128)
    chosen = FA3.configure(p, "hopper", {"bwd_BLOCK_M": BLOCK_M})
    (main,) = (kernel for kernel in chosen.kernels(p) if kernel.name == "fa3_bwd")
    one = dataclasses.replace(H100, sm=dataclasses.replace(H100.sm, count=1))
    ticks = FastSimulation(one, 1830, main, p, Options(private_memory=True)).run().active
    step = ticks / 256 / (80 * 64 / BLOCK_M)
    assert 40 * BLOCK_M < step < 65 * BLOCK_M


@pytest.mark.parametrize(("head_dim", "mask"), [(128, "full"), (64, "causal"), (192, "full")])
@pytest.mark.parametrize(
    ("l2", "tolerance"), [(H100.memory.l2_share_byte, 0.05), (0, 0.08)], ids=["H100's L2", "little"]
)
def test_the_fast_path(head_dim: int, mask: str, l2: int, tolerance: float) -> None:
    """With less L2 than Q, dO and dQ of a head take, memory is late all the time, and the fast path less exact."""
    p = problem(head_dim, heads_q=3, seqlen_q=768, mask=mask)
    device = with_sms(3)
    memory = dataclasses.replace(device.memory, l2_share_byte=l2 or device.memory.l2_share_byte)
    fast, full = (simulate(p, "fa3", dataclasses.replace(device, memory=memory), full=full) for full in (False, True))
    assert fast.ticks == pytest.approx(full.ticks, rel=tolerance)
    assert fast.hbm_bytes.read == pytest.approx(full.hbm_bytes.read, rel=0.05)


def test_the_schedule_says_that_it_has_a_backward_pass() -> None:
    assert load_schedule("fa3").directions == ("fwd", "bwd", "fwd+bwd")
