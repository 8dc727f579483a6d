"""The shapes and values that attention test suites are known to try, through every schedule that computes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import Hazard, InputError
from flashsim.machine.gpu import FullSimulation
from flashsim.machine.options import Options
from flashsim.numerics.functional import run_tensors
from flashsim.numerics.reference import attention_reference
from flashsim.problem import AttentionProblem
from flashsim.schedules import load_schedule, schedule_names
from flashsim.simulate import simulate
from flashsim.testing import KINDS, AttentionCase, assert_attention_close

SCHEDULES = pytest.mark.parametrize("schedule", schedule_names())
MASKS = pytest.mark.parametrize("mask", ["full", "causal"])


@functools.cache
def device(sms: int = 2) -> DeviceSpec:
    """An H100 with few SMs, so that a CTA works on many tiles."""
    spec = load_device("h100-sxm5")
    return dataclasses.replace(spec, sm=dataclasses.replace(spec.sm, count=sms))


def is_exact(schedule: str, **sizes: Any) -> bool:
    problem = AttentionProblem(**({"batch": 1, "heads_q": 1, "head_dim": 16} | sizes))
    found = simulate(problem, schedule, device(), functional=True).functional
    assert found is not None
    return found.accepted


@SCHEDULES
@MASKS
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"),
    [
        (1, 1), (1, 3), (2, 1), (1, 239), (239, 1), (3, 799), (799, 3), (511, 1), (3, 513), (113, 203), (128, 217),
        (108, 256), (640, 128), (1023, 1024), (1024, 1023), (64, 8192),
    ],
)  # fmt: skip
def test_lengths(schedule: str, mask: str, seqlen_q: int, seqlen_k: int) -> None:
    assert is_exact(schedule, mask=mask, seqlen_q=seqlen_q, seqlen_k=seqlen_k)


@pytest.mark.parametrize("schedule", ["fa2", "fa3"])
def test_a_long_sequence(schedule: str) -> None:
    assert is_exact(schedule, mask="causal", seqlen_q=4224, seqlen_k=4224)


EDGES = (1, 3, 7, 15, 31, 33, 63, 65, 127, 129, 191, 193, 255, 257, 511, 513)


@SCHEDULES
@pytest.mark.parametrize("edge", EDGES)
def test_tile_edges(schedule: str, edge: int) -> None:
    """One element beside powers of two and beside the tiles that are shipped, as queries, as keys and as both."""
    assert is_exact(schedule, mask="full", seqlen_q=edge, seqlen_k=edge)
    for mask in ("full", "causal"):
        assert is_exact(schedule, mask=mask, seqlen_q=edge, seqlen_k=129)
        assert is_exact(schedule, mask=mask, seqlen_q=129, seqlen_k=edge)


@SCHEDULES
@MASKS
@pytest.mark.parametrize("primes", [(3, 5, 1, 61, 67), (2, 7, 7, 193, 131), (5, 6, 2, 31, 257), (3, 11, 1, 97, 13)])
def test_primes(schedule: str, mask: str, primes: tuple[int, ...]) -> None:
    """And (5, 6, 2): three query heads on each of two KV heads."""
    batch, heads_q, heads_kv, seqlen_q, seqlen_k = primes
    sizes = {"batch": batch, "heads_q": heads_q, "heads_kv": heads_kv, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    assert is_exact(schedule, mask=mask, **sizes)


@SCHEDULES
@pytest.mark.parametrize(("heads_q", "heads_kv"), [(6, 3), (12, 4), (8, 1), (6, 6)])
def test_gqa_ratios(schedule: str, heads_q: int, heads_kv: int) -> None:
    assert is_exact(schedule, mask="causal", heads_q=heads_q, heads_kv=heads_kv, seqlen_q=113, seqlen_k=203)


HEAD_DIMS = [(d, d) for d in (8, 16, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)]
WIDEST = {"fa1": 128}


@SCHEDULES
@MASKS
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [*HEAD_DIMS, (64, 256), (192, 128), (256, 64), (16, 8)])
def test_head_dims(schedule: str, mask: str, head_dim: int, head_dim_v: int) -> None:
    sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "seqlen_q": 113, "seqlen_k": 203, "mask": mask}
    if max(head_dim, head_dim_v) > WIDEST.get(schedule, 256):
        with pytest.raises(InputError, match="head_dim"):
            is_exact(schedule, **sizes)
    else:
        assert is_exact(schedule, **sizes)


@SCHEDULES
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "message"),
    [
        (512, 512, "needs .* (registers per thread|bytes of shared memory)|the kernels end at 128"),
        (64, 512, "needs .* (registers per thread|bytes of shared memory)|the kernels end at 128"),
        (513, 64, "head_dim: got 513, must be a whole number from 1 to 512"),
    ],
)
def test_head_dims_that_no_schedule_has(schedule: str, head_dim: int, head_dim_v: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        is_exact(schedule, head_dim=head_dim, head_dim_v=head_dim_v, seqlen_q=8)


@pytest.mark.parametrize("size", ["batch", "heads_q", "seqlen_q", "seqlen_k", "head_dim_v"])
def test_an_empty_problem_is_refused(size: str) -> None:
    with pytest.raises(InputError, match=f"{size}: got 0, must be a whole number from 1"):
        is_exact("fa3", **({"seqlen_q": 8} | {size: 0}))


# Values. A run that rounds every tile to its dtype is judged by the rule for kernels.

Array = NDArray[np.float64]


def run(problem: AttentionProblem, qkv: Sequence[Array], schedule: str, rounded: bool) -> tuple[Array, Array]:
    """(O, LSE) that the schedule's kernels compute."""
    tensors = run_tensors(problem, *qkv)
    chosen = load_schedule(schedule).configure(problem, device().architecture, {"BLOCK_M": 64, "BLOCK_N": 64})
    for kernel in chosen.kernels(problem):
        settings = Options(tensors=tensors, rounded=rounded)
        FullSimulation(device(), device().clock.datasheet_mhz, kernel, problem, settings).run()
    return tensors["O"], tensors["LSE"].transpose(0, 2, 1)


@SCHEDULES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("seqlen", "mask", "dtype"),
    [
        (1, "full", "fp16"), (2, "causal", "bf16"), (5, "full", "bf16"), (17, "causal", "fp16"),
        (150, "full", "bf16"), (150, "causal", "fp16"),
    ],
)  # fmt: skip
def test_values(schedule: str, kind: str, seqlen: int, mask: str, dtype: str) -> None:
    """flash-attn's lengths for overflow, and three tiles."""
    problem = AttentionProblem(
        batch=1, heads_q=2, heads_kv=1, seqlen_q=seqlen, seqlen_k=seqlen + 3, head_dim=32, mask=mask, dtype=dtype
    )
    case = AttentionCase(problem, kind, seed=seqlen)
    o_ref, lse_ref = attention_reference(*case.qkv, mask)
    o, lse = run(problem, case.qkv, schedule, rounded=False)
    np.testing.assert_allclose(o, o_ref, rtol=0, atol=1e-9 * max(1.0, np.abs(case.v).max()))
    np.testing.assert_allclose(lse, lse_ref, rtol=1e-9)
    if schedule != "standard":
        o, lse = run(problem, case.qkv, schedule, rounded=True)
        assert_attention_close(o, case, lse=lse)
    elif kind not in ("huge_scores", "negative_rows"):
        # It stores S before the scale, in the problem's dtype: large scores overflow or are coarse, and so is the LSE.
        assert_attention_close(run(problem, case.qkv, schedule, rounded=True)[0], case)


@SCHEDULES
@pytest.mark.parametrize("tensor", [0, 1, 2])
def test_nan_that_is_read_ends_the_run(schedule: str, tensor: int) -> None:
    """Even where the mask would hide it: to a schedule NaN is memory that nobody has written."""
    problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=150, head_dim=32, mask="causal")
    tensors = [x.copy() for x in AttentionCase(problem).qkv]
    tensors[tensor][0, -1] = np.nan
    with pytest.raises(Hazard, match="not a number"):
        run(problem, tensors, schedule, rounded=False)


@SCHEDULES
@pytest.mark.parametrize("rounded", [False, True])
def test_a_batch_element_and_a_head_are_computed_as_if_alone(schedule: str, rounded: bool) -> None:
    """To the last bit, whatever the tile scheduler deals to the SMs."""
    problem = AttentionProblem(batch=3, heads_q=4, heads_kv=2, seqlen_q=90, seqlen_k=150, head_dim=16, mask="causal")
    alone = dataclasses.asdict(problem) | {"batch": 1, "heads_q": 1, "heads_kv": 1}
    q, k, v = AttentionCase(problem).qkv
    o, lse = run(problem, (q, k, v), schedule, rounded)
    for b, h in ((0, 0), (1, 2), (2, 3)):
        batch, head, kv = slice(b, b + 1), slice(h, h + 1), slice(h // 2, h // 2 + 1)
        tensors = q[batch, :, head], k[batch, :, kv], v[batch, :, kv]
        mine, mine_lse = run(AttentionProblem(**alone), tensors, schedule, rounded)
        np.testing.assert_array_equal(mine, o[batch, :, head])
        np.testing.assert_array_equal(mine_lse, lse[batch, head])
