"""Standard attention as a framework runs it: exact in both passes; its kernels, traffic, memory and published times."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsim.analysis.accuracy import Prediction, predict
from flashsim.devices import DeviceSpec, load_device
from flashsim.io.measured import read_measured
from flashsim.problem import AttentionProblem
from flashsim.schedules import load_schedule
from flashsim.simulate import simulate

MEASURED = Path(__file__).parents[2] / "scenarios" / "measured" / "calibration.csv"
SIZES = (1, 2, 31, 64, 67, 128, 129, 193, 257)
MASKS = ("full", "causal", "window:30,5", "prefix:20", "padding", "varlen-causal:{lengths}", "documents:20+{rest}")
"""Added to the scores, and filled in where they are, since batch entries differ."""


def device(name: str, sms: int) -> DeviceSpec:
    found = load_device(name)
    return dataclasses.replace(found, sm=dataclasses.replace(found.sm, count=sms))


@st.composite
def problems(draw: st.DrawFn) -> AttentionProblem:
    heads_kv, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    seqlen_q, batch = draw(st.sampled_from(SIZES)), draw(st.sampled_from([1, 2]))
    mask = draw(st.sampled_from(MASKS)) if seqlen_q > 20 else "full"
    lengths = ",".join(str(seqlen_q // n) for n in range(1, batch + 1))
    same = mask.startswith(("documents", "varlen"))
    return AttentionProblem(
        batch=batch,
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_q if same else draw(st.sampled_from(SIZES[2:])),
        head_dim=draw(st.sampled_from([16, 40, 64])),
        head_dim_v=draw(st.sampled_from([16, 40, 64])),
        mask=mask.format(rest=seqlen_q - 20, lengths=lengths),
        dropout=draw(st.sampled_from([0.0, 0.1, 0.5])),
        direction=draw(st.sampled_from(["bwd", "fwd+bwd"])),
        dtype=draw(st.sampled_from(["fp16", "bf16"])),
    )


@given(problems(), st.sampled_from(["h100-sxm5", "a100-sxm4-80gb"]), st.sampled_from([64, 128]))
def test_both_passes_are_exact(problem: AttentionProblem, gpu: str, block: int) -> None:
    options = {"BLOCK_M": block, "BLOCK_N": 192 - block}
    found = simulate(problem, "standard", device(gpu, 2), options=options, functional=True).functional
    assert found is not None
    assert found.accepted
    assert max(found.gradient_max_abs_error.values()) <= 1e-9


@given(problems())
@settings(max_examples=settings().max_examples // 4)
def test_both_passes_are_accepted_in_low_precision(problem: AttentionProblem) -> None:
    found = simulate(problem, "standard", device("h100-sxm5", 2), functional="dtype").functional
    assert found is not None
    assert found.accepted


def test_rows_that_no_cta_holds_in_fp32() -> None:
    """Longer ones are held as 16 bits."""
    for seqlen_k in (16384, 24576):
        problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=64, seqlen_k=seqlen_k, head_dim=64, direction="fwd+bwd")
        assert simulate(problem, "standard").time_us > 0


def kernels(**fields: Any) -> list[str]:
    problem = AttentionProblem(batch=2, seqlen_q=256, head_dim=64, **{"heads_q": 4} | fields)
    found = load_schedule("standard").configure(problem, "hopper", {}).kernels(problem)
    return [kernel.name.removeprefix("standard_") for kernel in found]


FORWARD = ["permute_Q", "permute_K", "permute_V", "scores", "softmax", "output"]
BACKWARD = ["dP", "dV", "softmax_bwd", "dQ", "dK", "scale_dQ", "scale_dK", "permute_dQ", "permute_dK", "permute_dV"]
FILL = [f"mask_bwd_{step}" for step in ("zero", "copy", "base", "slice", "clone", "fill", "return")]


def test_kernels() -> None:
    assert kernels() == FORWARD
    assert kernels(direction="bwd") == BACKWARD
    assert kernels(direction="fwd+bwd") == FORWARD + BACKWARD


def test_kernels_of_a_mask() -> None:
    """One that is added costs the backward pass nothing; one that is filled in costs it a chain of copies."""
    for mask in ("causal", "padding"):
        assert kernels(mask=mask) == [*FORWARD[:4], "mask", *FORWARD[4:]]
    assert kernels(mask="causal", direction="bwd") == BACKWARD
    assert kernels(mask="padding", direction="bwd") == BACKWARD[:3] + FILL + BACKWARD[3:]


def test_kernels_of_dropout_and_of_grouped_heads() -> None:
    assert kernels(dropout=0.1) == [*FORWARD[:5], "dropout", *FORWARD[5:]]
    assert kernels(dropout=0.1, direction="bwd") == [*BACKWARD[:2], "dropout_bwd", *BACKWARD[2:]]
    assert kernels(heads_kv=2) == ["repeat_K", "repeat_V", *FORWARD]
    assert kernels(heads_kv=2, direction="bwd") == [*BACKWARD, "sum_dK", "sum_dV"]


@pytest.mark.parametrize("how", [{}, {"mask": "padding"}, {"mask": "padding", "dropout": 0.1}, {"mask": "causal"}])
def test_memory_is_what_the_flashattention_paper_measured(how: dict[str, Any]) -> None:
    """Table 21 of arXiv 2205.14135, in MiB: batch 16, 8 heads of 64, forward and backward. Its numbers are four
    matrices of scores and ten tensors of the size of Q; it does not say with what mask and dropout."""
    published = {128: 36, 256: 104, 512: 336, 1024: 1184, 2048: 4416, 4096: 17024}
    for seqlen, mib in published.items():
        problem = AttentionProblem(batch=16, heads_q=8, seqlen_q=seqlen, head_dim=64, direction="fwd+bwd", **how)
        chosen = load_schedule("standard").configure(problem, "ampere", {})
        assert (problem.memory_bytes + chosen.workspace_byte(problem)) / 2**20 == pytest.approx(mib, rel=0.12)


def test_traffic_is_what_the_flashattention_paper_counts() -> None:
    """GPT-2 medium in figure 2 of arXiv 2205.14135: 40.3 GB forward and backward, causal and with dropout."""
    problem = AttentionProblem(
        batch=64, heads_q=16, seqlen_q=1024, head_dim=64, mask="causal", dropout=0.1, direction="fwd+bwd"
    )
    moved = simulate(problem, "standard", "a100-sxm4-40gb").hbm_bytes
    assert (moved.read + moved.written) / 1e9 == pytest.approx(40.3, rel=0.08)


SESSIONS = {"fa3-paper-h100": {"clock_mhz": 1830}, "fa2-paper-h100-sxm5": {"clock_mhz": 1830}}


def test_published_times_on_h100() -> None:
    """Forward, backward and both, the shortest and the longest sequences."""
    rows = [row for row in read_measured(MEASURED) if row.schedule == "standard" and row.session in SESSIONS]
    rows = [row for row in rows if row.seqlen_q in (512, 8192)]
    assert {row.direction for row in rows} == {"fwd", "bwd", "fwd+bwd"}
    errors = [prediction.error for prediction in predict(rows, SESSIONS) if isinstance(prediction, Prediction)]
    assert len(errors) == len(rows) == 8
    assert max(map(abs, errors)) <= 0.1
    assert fmean(map(abs, errors)) <= 0.06


def test_what_a_long_sequence_costs() -> None:
    problem = AttentionProblem(batch=1, heads_q=16, seqlen_q=16384, head_dim=128)
    assert simulate(problem, "standard").events < 80_000
    assert simulate(dataclasses.replace(problem, direction="bwd"), "standard").events < 130_000
