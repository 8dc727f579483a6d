"""FlashAttention-3 in fp8: exact on what the quantized tensors stand for, mistakes noticed, and what it costs."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashsim.check.equivalent import source_of
from flashsim.check.example import Latencies
from flashsim.check.survey import _load, _with_part
from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import Deadlock, Infeasible, InputError, Race, SimulationError
from flashsim.machine.costs import PERMUTE_INSTRUCTIONS
from flashsim.machine.options import Options
from flashsim.numerics.fp8 import quantize
from flashsim.numerics.functional import run_tensors
from flashsim.numerics.hadamard import hadamard_transform
from flashsim.numerics.inputs import random_inputs
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.verbs import HADAMARD_SEED
from flashsim.problem import AttentionProblem
from flashsim.result import Functional
from flashsim.schedules import Schedule
from flashsim.schedules.fa3 import FA3
from flashsim.schedules.fa3_fp8 import FA3FP8
from flashsim.simulate import configured, run_kernels, simulate
from flashsim.units import ticks

EXACT = 1e-9
H100 = load_device("h100-sxm5")
SMALL = {"BLOCK_M": 128, "BLOCK_N": 32}
INCOHERENT = ("off", "fused", "separate")


def device(sms: int = 2) -> DeviceSpec:
    return replace(H100, sm=replace(H100.sm, count=sms))


def problem(**fields: Any) -> AttentionProblem:
    sizes = {"batch": 1, "heads_q": 2, "heads_kv": 1, "seqlen_q": 150, "seqlen_k": 230, "head_dim": 64}
    return AttentionProblem(**sizes | {"dtype": "fp8"} | fields)


def judged(p: AttentionProblem, schedule: str | type[Schedule] = "fa3", **settings: Any) -> Functional:
    found = simulate(p, schedule, device(), **{"functional": True, "options": SMALL} | settings).functional
    assert found is not None
    return found


# Numbers.


@pytest.mark.parametrize("incoherent", INCOHERENT)
@pytest.mark.parametrize(
    ("mask", "sizes"),
    [
        ("full", {}),
        ("causal", {}),
        ("causal", {"seqlen_k": 20}),
        ("window:40,10", {}),
        ("documents:30+3+117", {"seqlen_k": 150}),
        ("varlen:0,150", {"batch": 2, "seqlen_k": 150}),
        ("full", {"seqlen_q": 1, "seqlen_k": 1}),
        ("full", {"heads_q": 4, "heads_kv": 2, "seqlen_q": 257, "seqlen_k": 65}),
    ],
)
def test_exact_on_what_the_quantized_tensors_stand_for(mask: str, sizes: dict[str, int], incoherent: str) -> None:
    found = judged(problem(mask=mask, **sizes), options=SMALL | {"incoherent": incoherent})
    assert found.accepted
    assert max(found.max_abs_error, found.lse_max_abs_error) <= EXACT


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (128, 64), (40, 20)]
)
def test_published_tiles_are_exact(head_dim: int, head_dim_v: int) -> None:
    p = problem(head_dim=head_dim, head_dim_v=head_dim_v, seqlen_k=600, mask="causal")
    assert judged(p, options={}).accepted


@pytest.mark.parametrize("incoherent", INCOHERENT)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_run_that_rounds_is_accepted(head_dim: int, incoherent: str) -> None:
    found = judged(problem(head_dim=head_dim, mask="causal"), options={"incoherent": incoherent}, functional="dtype")
    assert found.accepted
    assert found.max_abs_error > 1e-4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("incoherent", ["off", "separate"])
def test_exact_whatever_the_latencies(seed: int, incoherent: str) -> None:
    slow = Latencies(tuple((kind, "random") for kind in ("memory", "tma", "smem", "alu", "barrier", "tensor")), seed)
    options = SMALL | {"incoherent": incoherent, "num_stages": 2 + seed}
    assert judged(problem(mask="causal"), options=options, draw=slow.draw()).accepted


def tensors(p: AttentionProblem, k_times: float = 1.0, **options: Any) -> dict[str, Any]:
    """Those of a run whose keys 32 to 63, a block, are `k_times` as large; as given, they have `_given`."""
    q, k, v = random_inputs(p, 5)
    k[:, 32:64] *= k_times
    found = run_tensors(p, q.copy(), k.copy(), v.copy())
    run_kernels(p, configured(FA3, p, device(), SMALL | options), device(), 1500, Options(tensors=found))
    return found | {"Q_given": q, "K_given": k, "V_given": v}


@pytest.mark.parametrize("k_times", [1.0, 0.0, 1e-6, 1e4])
@pytest.mark.parametrize("incoherent", ["off", "fused"])
def test_each_block_is_quantized_with_a_scale_of_its_own(incoherent: str, k_times: float) -> None:
    """O is that of the dequantized blocks: of BLOCK_M queries, and of BLOCK_N keys."""
    p = problem()
    found = tensors(p, k_times, incoherent=incoherent)
    values = {}
    for name, block in (("Q", 128), ("K", 32), ("V", 32)):
        x = found[f"{name}_given"]
        x = hadamard_transform(x, HADAMARD_SEED) if incoherent == "fused" and name != "V" else x
        values[name] = quantize(x, block).values
    o, lse = attention_reference(values["Q"], values["K"], values["V"])
    assert np.abs(found["O"] - o).max() <= EXACT
    assert np.abs(found["LSE"].transpose(0, 2, 1) - lse).max() <= 1e-9 * np.abs(lse).max()


@pytest.mark.parametrize("k_times", [1.0, 0.0, 1e4])
def test_kernels_of_their_own_transform_and_quantize_what_they_are_given(k_times: float) -> None:
    """Without rounding, codes times the scale are x H to the last digits; a scale is the largest element over 448."""
    p = problem(batch=2)
    found = tensors(p, k_times, incoherent="separate")
    for name, block in (("Q", 128), ("K", 32)):
        expected = hadamard_transform(found[f"{name}_given"], HADAMARD_SEED)
        scales = found[f"{name}_scale"][..., 0]
        for first in range(0, expected.shape[1], block):
            rows, codes = expected[:, first : first + block], found[f"{name}_fp8"][:, first : first + block]
            scale = scales[:, first]
            np.testing.assert_allclose(scale, np.abs(rows).max(axis=(1, 3)) / 448, rtol=1e-12)
            np.testing.assert_allclose(codes * scale[:, None, :, None], rows, rtol=1e-12, atol=1e-12)
            assert np.isnan(scales[:, first + 1 : first + block]).all()


def test_both_ways_to_be_incoherent_are_the_same_numbers() -> None:
    """Up to the scales, which are computed from tensors that were rounded in the one and not in the other."""
    fused, separate = (tensors(problem(), incoherent=how)["O"] for how in ("fused", "separate"))
    assert 0 < np.abs(fused - separate).max() < 0.1


# Mistakes.


def changed(old: str, new: str) -> type[Schedule]:
    """fa3 with one piece of its fp8 kernels replaced."""
    text = source_of(FA3FP8)
    assert text.count(old) == 1
    return _with_part(FA3, FA3FP8, _load(text.replace(old, new), FA3FP8))


@pytest.mark.parametrize("functional", [True, "dtype"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('wg.map("mul", r.S, *scales, into=r.S)', "pass"),
        ("tile.Q_scale.rows(0, 1), tile.K_scale(j)", "tile.Q_scale.rows(0, 1), tile.K_scale(tile.last)"),
        ("scales = tile.Q_scale.rows(0, 1), tile.K_scale(j)", "scales = tile.K_scale(j).rows(0, 1), tile.K_scale(j)"),
        ('wg.map("mul", r.O, tile.V_scale(tile.last).rows(0, 1), into=r.O)', "pass"),
        ('wg.map("mul", r.stats.alpha, tile.V_scale(j - 1).rows(0, 1), into=r.stats.alpha)', "pass"),
        ('wg.map("div", r.stats.alpha, tile.V_scale(j).rows(0, 1), into=r.stats.alpha)', "pass"),
        ('wg.map("div", r.stats.l, P_TIMES, into=r.stats.l)', "pass"),
        ("P_TIMES = 256.0", "P_TIMES = 1024.0"),
    ],
    ids=["no scales of S", "K's last scale", "K's scale for Q's", "no scale of V", "V's next scale", "V's scale before",
         "LSE of 256 P", "P beyond e4m3"],
)  # fmt: skip
def test_dropped_scales_are_rejected(old: str, new: str, functional: bool | str) -> None:
    """P beyond 448 only where numbers are rounded, and saturate."""
    found = judged(problem(mask="causal"), changed(old, new), functional=functional)
    assert found.accepted == (functional is True and "1024" in new)


@pytest.mark.parametrize(
    ("old", "new", "slot"), [("s.Vt[tile.last].T", "s.V[tile.last]", "V"), ("s.Vt[j - 1].T", "s.V[j - 1]", "V"),
                             ("s.Vt[tile.last].T", "s.Vt[tile.last].T.T.T", ""), ("s.K[j].T", "s.K[j]", "K")]
)  # fmt: skip
def test_a_product_reads_8_bits_along_k_only(old: str, new: str, slot: str) -> None:
    """V as it was loaded is not, which is why it is transposed."""
    text = source_of(FA3FP8)
    schedule = _with_part(FA3, FA3FP8, _load(text.replace(old, new), FA3FP8))
    p = problem(head_dim=64, seqlen_k=256)
    if not slot:
        assert judged(p, schedule).accepted
        return
    square = SMALL | {"BLOCK_N": 64}  # so that shapes fit either way
    message = rf"gemm of 8 bits reads {slot}(\[\d\])? along k: its tile must hold the transpose"
    with pytest.raises(SimulationError, match=message):
        judged(p, schedule, options=square)


@pytest.mark.parametrize(
    ("old", "error"),
    [
        ("s.Vt.commit(j)", Deadlock),
        ("s.V.release(j)", Deadlock),
        ("yield s.Vt.empty(j)", Race),
        ("yield s.V.full(j)", Race),
    ],
)
def test_the_transpose_is_ordered_with_the_load_and_the_product(old: str, error: type[SimulationError]) -> None:
    with pytest.raises(error):
        judged(problem(seqlen_k=400), changed(old, "pass"))


# What is refused.


def refused(p: AttentionProblem, options: dict[str, Any], schedule: str = "fa3", gpu: str = "h100-sxm5") -> list[str]:
    with pytest.raises(InputError) as error:
        simulate(p, schedule, gpu, options=options)
    return list(error.value.problems)


def test_where_there_is_no_fp8() -> None:
    for gpu, architecture in (("a100-sxm4-80gb", "ampere"), ("l4", "ada")):
        line = f"schedule fa3 does not run on {architecture} (it runs on: hopper)"
        assert refused(problem(), {}, gpu=gpu) == [line]
    for schedule in ("fa2", "split_kv"):
        assert refused(problem(), {}, schedule) == [f"schedule {schedule} has no dtype 'fp8' (it has: fp16, bf16)"]
    assert refused(problem(), {}, "fa2", "a100-sxm4-80gb") == ["schedule fa2 has no dtype 'fp8' (it has: fp16, bf16)"]


@pytest.mark.parametrize("direction", ["bwd", "fwd+bwd"])
def test_there_is_no_backward_pass(direction: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"direction: got '{direction}', fp8 has fwd only")):
        problem(direction=direction)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"warp_specialized": False, "persistent": False}, "warp_specialized must be True for fp8"),
        ({"persistent": False}, "persistent must be True for fp8"),
        ({"intra_wg_overlap": False}, "intra_wg_overlap must be True for fp8"),
        ({"P_in_shared": True}, "P_in_shared must be False for fp8"),
        ({"BLOCK_N": 48}, "BLOCK_N = 48, allowed are multiples of 32 for fp8 (k of a wgmma)"),
        (
            {"overlap_stages": 3},
            "overlap_stages = 3 needs warp_specialized, intra_wg_overlap, P in registers and 16 bits",
        ),
    ],
)
def test_switches_that_fp8_has_not(options: dict[str, Any], line: str) -> None:
    assert f"schedule fa3: {line}" in refused(problem(), options)


@pytest.mark.parametrize("head_dim", [32, 96, 100, 192])
@pytest.mark.parametrize("incoherent", ["fused", "separate"])
def test_a_hadamard_matrix_has_a_power_of_two_rows(head_dim: int, incoherent: str) -> None:
    line = f"schedule fa3: incoherent needs head_dim 64, 128 or 256, not {head_dim}: a Hadamard matrix"
    assert refused(problem(head_dim=head_dim), {"incoherent": incoherent}) == [line]


def test_incoherent_processing_is_for_fp8() -> None:
    assert refused(problem(dtype="bf16"), {"incoherent": "fused"}) == ["schedule fa3: incoherent is for fp8"]


def test_head_dim_512_does_not_fit() -> None:
    with pytest.raises(Infeasible, match=r"fa3_fwd_fp8 .* needs \d+ registers per thread of a consumer"):
        simulate(problem(head_dim=512), "fa3")


# Time.


def large(**fields: Any) -> AttentionProblem:
    return problem(
        **{"heads_q": 16, "heads_kv": 16, "seqlen_q": 4096, "seqlen_k": 4096, "head_dim": 128} | fields
    )  # fmt: skip


def test_it_is_faster_than_16_bits_and_its_peak_is_that_of_fp8() -> None:
    narrow, wide = (simulate(large(dtype=dtype), "fa3", H100) for dtype in ("fp8", "bf16"))
    assert narrow.flops == wide.flops
    assert narrow.time_us < 0.95 * wide.time_us
    for result, flop_per_clk in ((narrow, H100.tensor.fp8_flop_per_clk), (wide, H100.tensor.fp16_flop_per_clk)):
        assert flop_per_clk is not None
        peak = flop_per_clk * H100.sm.count * result.clock_mhz / 1e6
        assert result.peak_fraction == pytest.approx(result.tflops / peak)
    assert narrow.datasheet_fraction == pytest.approx(narrow.tflops / (2 * H100.tensor.fp16_tflops))
    assert narrow.peak_fraction < 1


def test_kernels_that_transform_and_quantize_are_bound_by_memory() -> None:
    """Each element is read in 16 bits and written in 8."""
    p = large(batch=4, seqlen_q=2048, seqlen_k=2048, mask="window:0,0")  # of attention itself not much
    separate = simulate(p, "fa3", H100, options={"incoherent": "separate"})
    assert [kernel.name for kernel in separate.kernels] == ["fa3_quantize_q", "fa3_quantize_k", "fa3_fwd_fp8"]
    byte = 3 * 4 * 16 * 2048 * 128
    for kernel in separate.kernels[:2]:
        assert 1 <= kernel.time_us / (byte / H100.memory.hbm_byte_per_ns / 1000) <= 1.3


def test_attention_takes_the_same_time_whoever_transforms_q_and_k() -> None:
    p = problem(seqlen_q=512, seqlen_k=512)
    off, fused, separate = (
        simulate(p, "fa3", device(), options={"incoherent": how}, full=True).kernels for how in INCOHERENT
    )
    assert fused == off
    assert [kernel.ticks for kernel in separate[2:]] == [kernel.ticks for kernel in off]


def test_the_permutation_of_p_is_work_of_the_alu() -> None:
    """For each element of S: two heads, two blocks of 128 queries, 8 KV tiles of 32 keys."""
    p, on = problem(seqlen_q=256, seqlen_k=256), device()
    without = changed('wg.map("permute", r.S, into=r.S)', "pass")
    busy = [
        result.utilization["alu"].elapsed * result.ticks * on.sm.count
        for result in (simulate(p, kind, on, options=SMALL, full=True) for kind in (FA3, without))
    ]
    assert busy[0] - busy[1] == pytest.approx(ticks(2 * 256 * 256 * PERMUTE_INSTRUCTIONS / on.pipes.alu_op_per_clk))


@pytest.mark.parametrize("incoherent", ["off", "separate"])
def test_the_fast_path(incoherent: str) -> None:
    p = problem(heads_q=4, heads_kv=4, seqlen_q=1024, seqlen_k=1024, head_dim=128, mask="causal")
    fast, full = (
        simulate(p, "fa3", device(4), options={"incoherent": incoherent}, full=full).kernels[-1].ticks
        for full in (False, True)
    )
    assert fast == pytest.approx(full, rel=0.03)
