"""Every schedule computes attention, to 1e-9 and whatever the latencies are, in the run that is timed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import InputError
from flashsim.machine.gpu import FullSimulation, KernelRun
from flashsim.machine.options import Options
from flashsim.machine.sm import UNITS
from flashsim.numerics.inputs import random_inputs
from flashsim.problem import AttentionProblem
from flashsim.result import Result
from flashsim.schedules import fa3, load_schedule
from flashsim.simulate import simulate

EXACT = 1e-9
PRIMES = (1, 2, 3, 13, 31, 61, 67, 97, 127, 131, 193)
"""And 1."""
FAR_BEYOND = 1 << 24
"""65536 cycles: a hundred times the latency of HBM."""


def with_sms(name: str, count: int) -> DeviceSpec:
    """The device with `count` SMs only, so that a CTA of a small problem has many tiles to work on."""
    device = load_device(name)
    return dataclasses.replace(device, sm=dataclasses.replace(device.sm, count=count))


@dataclass(frozen=True)
class Latencies:
    """Replaces every duration by one that follows from the seed; those of the kind `slow` are far beyond hardware."""

    seed: int
    slow: str

    def draw(self) -> Callable[[str, int], int]:
        """To be used for one run: the same calls in the same order give the same durations."""
        random = Random(self.seed)

        def duration(kind: str, ticks: int) -> int:
            if kind == self.slow:
                return random.randrange(FAR_BEYOND)
            return random.choice((0, ticks, random.randrange(2 * ticks + 1), random.randrange(20 * ticks + 1)))

        return duration


@dataclass(frozen=True)
class Case:
    """One thing to simulate."""

    schedule: str
    gpu: str
    sms: int
    problem: AttentionProblem
    options: dict[str, Any]
    latencies: Latencies

    @property
    def device(self) -> DeviceSpec:
        return with_sms(self.gpu, self.sms)

    def simulate(self, **settings: Any) -> Result:
        return simulate(self.problem, self.schedule, self.device, options=self.options, **settings)

    def run(self, draw: Callable[[str, int], int] | None, tensors: dict[str, Any] | None) -> KernelRun:
        """The only kernel on the full machine; `tensors` receives O and LSE."""
        kind = load_schedule(self.schedule)
        device = self.device
        (kernel,) = kind.configure(self.problem, device.architecture, self.options).kernels(self.problem)
        settings = Options(draw=draw, tensors=tensors)
        return FullSimulation(device, device.clock.datasheet_mhz, kernel, self.problem, settings).run()


def tensors_of(problem: AttentionProblem) -> dict[str, Any]:
    q, k, v = random_inputs(problem, seed=1)
    rows = (problem.batch, problem.seqlen_q, problem.heads_q)
    return {"Q": q, "K": k, "V": v, "O": np.full((*rows, problem.head_dim_v), np.nan), "LSE": np.full(rows, np.nan)}


KINDS = (*UNITS, "memory", "latency", "barrier", "fill", "drain", "none")
latencies = st.builds(Latencies, st.integers(0, 2**32 - 1), st.sampled_from(KINDS))


def lengths(block: int, most: int) -> st.SearchStrategy[int]:
    """From 1 to about `most` tiles of `block`, with the edges of tiles and primes more often than chance would."""
    whole = st.sampled_from([n * block for n in range(1, most + 1)])
    beside = st.sampled_from([-1, 0, 1])
    inside = st.integers(1 - block, 0)
    return st.one_of(
        st.builds(int.__add__, whole, beside), st.builds(int.__add__, whole, inside), st.sampled_from(PRIMES)
    )


@st.composite
def problems(draw: st.DrawFn, BLOCK_M: int, BLOCK_N: int) -> AttentionProblem:
    heads_kv, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (1, 3), (2, 2)]))
    return AttentionProblem(
        batch=draw(st.sampled_from([1, 1, 1, 2])),
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        seqlen_q=draw(lengths(BLOCK_M, 3)),
        seqlen_k=draw(lengths(BLOCK_N, 6)),
        head_dim=draw(st.sampled_from([16, 32, 40, 64])),
        head_dim_v=draw(st.sampled_from([16, 32, 40, 64])),
        mask=draw(st.sampled_from(["full", "causal"])),
        dtype=draw(st.sampled_from(["fp16", "bf16"])),
    )


@st.composite
def fa3_cases(draw: st.DrawFn) -> Case:
    BLOCK_M, BLOCK_N = draw(st.sampled_from([64, 128, 192])), draw(st.sampled_from([16, 32, 48, 64]))
    warp_specialized = draw(st.booleans())
    options = {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "num_stages": draw(st.integers(1, 4)),
        "build": draw(st.sampled_from(["2024-07", "2025-01"])),
        "warp_specialized": warp_specialized,
        "intra_wg_overlap": draw(st.booleans()),
        "persistent": warp_specialized and draw(st.booleans()),
        "P_in_shared": draw(st.booleans()),
    }
    refused = not warp_specialized and not options["intra_wg_overlap"]  # with ping-pong; see FA3.complaints
    if draw(st.booleans()):  # else the schedule decides
        options["pingpong"] = not refused and draw(st.booleans())
    problem = draw(problems(BLOCK_M, BLOCK_N))
    return Case("fa3", "h100-sxm5", draw(st.sampled_from([1, 1, 2, 3])), problem, options, draw(latencies))


@st.composite
def fa2_cases(draw: st.DrawFn) -> Case:
    BLOCK_M, BLOCK_N = draw(st.sampled_from([64, 128, 256])), draw(st.sampled_from([16, 32, 48, 64]))
    gpu = draw(st.sampled_from(["h100-sxm5", "a100-sxm4-80gb"]))
    problem = draw(problems(BLOCK_M, BLOCK_N))
    options = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    return Case("fa2", gpu, draw(st.sampled_from([1, 1, 2, 3])), problem, options, draw(latencies))


@st.composite
def standard_cases(draw: st.DrawFn) -> Case:
    options = {"BLOCK_M": draw(st.sampled_from([64, 128])), "BLOCK_N": draw(st.sampled_from([64, 128]))}
    gpu = draw(st.sampled_from(["h100-sxm5", "a100-sxm4-80gb", "l4"]))
    return Case("standard", gpu, draw(st.sampled_from([1, 2])), draw(problems(64, 64)), options, draw(latencies))


def accepted(result: Result) -> None:
    found = result.functional
    assert found is not None
    assert found.accepted
    assert found.max_abs_error <= EXACT
    assert found.lse_max_abs_error <= EXACT
    assert found.hazards == ()


@given(fa3_cases())
@settings(max_examples=2 * settings().max_examples)
def test_fa3_is_exact_whatever_the_latencies(case: Case) -> None:
    event(f"producer {case.options['warp_specialized']}, overlap {case.options['intra_wg_overlap']}")
    accepted(case.simulate(functional=True, draw=case.latencies.draw()))


@given(standard_cases())
def test_standard_is_exact_whatever_the_latencies(case: Case) -> None:
    accepted(case.simulate(functional=True, draw=case.latencies.draw()))


@given(fa2_cases())
def test_fa2_is_exact_whatever_the_latencies(case: Case) -> None:
    accepted(case.simulate(functional=True, draw=case.latencies.draw()))


@given(st.one_of(fa3_cases(), fa2_cases()))
@settings(max_examples=settings().max_examples // 4)
def test_latencies_change_no_bit_of_the_result(case: Case) -> None:
    """Each row of O is summed in the order of the KV tiles, by one warpgroup; no latency can change that."""
    there, elsewhere = tensors_of(case.problem), tensors_of(case.problem)
    case.run(None, there)
    case.run(case.latencies.draw(), elsewhere)
    assert np.array_equal(there["O"], elsewhere["O"])
    assert np.array_equal(there["LSE"], elsewhere["LSE"])


@given(st.one_of(fa3_cases(), fa2_cases()))
@settings(max_examples=settings().max_examples // 4)
def test_computing_takes_no_time(case: Case) -> None:
    """A functional run and a timing run of the same machine agree in every number that both have."""
    assert case.run(case.latencies.draw(), tensors_of(case.problem)) == case.run(case.latencies.draw(), None)


@pytest.mark.parametrize("schedule", ["fa2", "fa3"])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"), [(64, 64), (128, 128), (136, 64), (64, 136), (192, 192), (256, 256)]
)
def test_published_tiles_are_exact(schedule: str, head_dim: int, head_dim_v: int) -> None:
    """With the tiles, stages and switches that the code ships; head dims above 128 take other branches."""
    for mask in ("full", "causal"):
        problem = AttentionProblem(
            batch=1,
            heads_q=2,
            heads_kv=1,
            seqlen_q=201,
            seqlen_k=413,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            mask=mask,
        )
        accepted(simulate(problem, schedule, with_sms("h100-sxm5", 1), functional=True))


@pytest.mark.parametrize("schedule", ["fa2", "fa3"])
@pytest.mark.parametrize("seqlen_k", [1, 63, 64])
def test_rows_that_see_no_key_are_zero_and_their_lse_is_minus_infinity(schedule: str, seqlen_k: int) -> None:
    """Causal, 300 queries: whole Q tiles, and a part of one, come before the first key."""
    problem = AttentionProblem(
        batch=1, heads_q=2, heads_kv=1, seqlen_q=300, seqlen_k=seqlen_k, head_dim=32, mask="causal"
    )
    options = {"BLOCK_M": 64, "BLOCK_N": 32}
    case = Case(schedule, "h100-sxm5", 1, problem, options, Latencies(0, "none"))
    tensors = tensors_of(problem)
    case.run(None, tensors)
    blind = 300 - seqlen_k
    assert np.all(tensors["O"][:, :blind] == 0)
    assert np.all(np.isneginf(tensors["LSE"][:, :blind]))
    assert np.all(np.isfinite(tensors["LSE"][:, blind:]))
    accepted(case.simulate(functional=True))


def test_one_cta_works_on_all_tiles() -> None:
    """Static and dynamic, one SM: 16 Q tiles of 4 heads go through the rings of one persistent CTA."""
    for mask in ("full", "causal"):
        problem = AttentionProblem(batch=2, heads_q=2, heads_kv=1, seqlen_q=500, seqlen_k=260, head_dim=16, mask=mask)
        case = Case(
            "fa3", "h100-sxm5", 1, problem, {"BLOCK_M": 128, "BLOCK_N": 32, "num_stages": 3}, Latencies(3, "memory")
        )
        accepted(case.simulate(functional=True))
        accepted(case.simulate(functional=True, draw=case.latencies.draw()))


def test_products_end_in_the_order_in_which_they_were_committed(tmp_path: Path) -> None:
    """As wgmma groups do: to wait for PV is to wait for the QK that was issued before it, whatever the latencies."""
    text = Path(fa3.__file__).read_text(encoding="utf-8")
    assert text.count("yield qk  # 12\n") == 1
    path = tmp_path / "waits_for_pv.py"
    path.write_text(text.replace("yield qk  # 12\n", "yield pv\n"), encoding="utf-8")
    problem = AttentionProblem(batch=1, heads_q=2, heads_kv=1, seqlen_q=130, seqlen_k=150, head_dim=16)
    case = Case(f"{path}:FA3", "h100-sxm5", 1, problem, {"BLOCK_M": 128, "BLOCK_N": 32}, Latencies(1, "drain"))
    accepted(case.simulate(functional=True))
    accepted(case.simulate(functional=True, draw=case.latencies.draw()))


def test_a_different_seed_is_different_numbers_and_the_same_time() -> None:
    """Numbers never steer a schedule."""
    problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=100, seqlen_k=100, head_dim=16)
    case = Case("fa3", "h100-sxm5", 1, problem, {"BLOCK_M": 64, "BLOCK_N": 32}, Latencies(0, "none"))
    ticks, outputs = set(), []
    for seed in (1, 2):
        tensors = tensors_of(problem)
        q, k, v = random_inputs(problem, seed)
        tensors |= {"Q": q, "K": k, "V": v}
        ticks.add(case.run(None, tensors).ticks)
        outputs.append(tensors["O"])
    assert len(ticks) == 1
    assert not np.array_equal(*outputs)


@pytest.mark.parametrize("schedule", ["fa2", "fa3"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_run_that_rounds_is_as_good_as_eager_attention(schedule: str, dtype: str) -> None:
    problem = AttentionProblem(batch=1, heads_q=2, heads_kv=1, seqlen_q=130, seqlen_k=200, head_dim=64, dtype=dtype)
    result = simulate(problem, schedule, with_sms("h100-sxm5", 1), functional="dtype")
    found = result.functional
    assert found is not None
    assert found.accepted
    assert found.max_abs_error > EXACT
    assert result.ticks == simulate(problem, schedule, with_sms("h100-sxm5", 1), functional=True).ticks


def test_a_problem_that_would_take_minutes_is_refused() -> None:
    problem = AttentionProblem(batch=4, heads_q=16, seqlen_q=4096, head_dim=128)
    with pytest.raises(InputError, match="a functional run of 550 GFLOP would take minutes"):
        simulate(problem, "fa3", functional=True)


def test_no_warning_is_hidden() -> None:
    """Masked rows give infinities on purpose; numpy must not complain about any of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=70, seqlen_k=5, head_dim=16, mask="causal")
        accepted(simulate(problem, "fa3", with_sms("h100-sxm5", 1), functional=True))
