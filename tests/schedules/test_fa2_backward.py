"""FlashAttention-2's backward pass: exact gradients, its kernels alone, what notices a mistake, and the fast path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashsim.check.equivalent import source_of
from flashsim.check.survey import _load, _with_part
from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import Infeasible, InputError, SimulationError
from flashsim.machine.options import Options
from flashsim.numerics.functional import run_tensors
from flashsim.numerics.gradients import attention_gradients_reference
from flashsim.numerics.inputs import random_do, random_inputs
from flashsim.problem import AttentionProblem
from flashsim.result import Functional
from flashsim.schedules import Schedule, load_schedule
from flashsim.schedules.fa2 import FA2
from flashsim.schedules.fa2_backward import FA2Backward
from flashsim.simulate import configured, run_kernels, simulate

EXACT = 1e-9
A100, H100, L4 = "a100-sxm4-80gb", "h100-sxm5", "l4"
SMALL = {"bwd_BLOCK_M": 64, "bwd_BLOCK_N": 64}


def device(name: str = A100, sms: int = 2) -> DeviceSpec:
    found = load_device(name)
    return replace(found, sm=replace(found.sm, count=sms))


def problem(**fields: Any) -> AttentionProblem:
    sizes = {"batch": 1, "heads_q": 2, "heads_kv": 1, "seqlen_q": 150, "seqlen_k": 230, "head_dim": 32}
    return AttentionProblem(**sizes | {"direction": "bwd"} | fields)


def judged(p: AttentionProblem, gpu: str = A100, **settings: Any) -> Functional:
    settings.setdefault("functional", True)
    found = simulate(p, settings.pop("schedule", "fa2"), device(gpu), **settings).functional
    assert found is not None
    return found


def exact(found: Functional) -> None:
    assert found.accepted
    assert found.gradient_max_abs_error is not None
    assert found.gradient_max_abs_error.keys() == {"dq", "dk", "dv"}
    assert max(found.gradient_max_abs_error.values()) <= EXACT


# Numbers.


@pytest.mark.parametrize(
    ("mask", "sizes"),
    [
        ("full", {}),
        ("causal", {}),
        ("causal", {"seqlen_k": 70}),  # the first 80 queries see nothing
        ("window:40,10", {}),
        ("window:0,0", {"seqlen_k": 150}),
        ("documents:30+3+117", {"seqlen_k": 150}),
        ("padding:230,71", {"batch": 2}),
        ("varlen:150,64", {"batch": 2, "seqlen_k": 150}),
        ("chunked:50", {}),
        ("prefix:100", {}),
    ],
)
def test_gradients_are_exact_under_masks(mask: str, sizes: dict[str, int]) -> None:
    exact(judged(problem(mask=mask, **sizes), options=SMALL))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)], ids=str)
def test_gradients_are_exact_with_shared_heads(heads: tuple[int, int]) -> None:
    exact(judged(problem(heads_q=heads[0], heads_kv=heads[1], seqlen_q=70, batch=2, mask="causal"), options=SMALL))


@pytest.mark.parametrize("seqlens", [(1, 1), (1, 300), (300, 1), (64, 64), (65, 63), (127, 129)], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_gradients_are_exact_at_ragged_lengths(seqlens: tuple[int, int], mask: str) -> None:
    exact(judged(problem(seqlen_q=seqlens[0], seqlen_k=seqlens[1], mask=mask), options=SMALL))


@pytest.mark.parametrize(
    ("gpu", "head_dim", "head_dim_v"),
    [
        *((gpu, d, d) for gpu in (A100, H100) for d in (64, 96, 128, 256)),
        *((L4, d, d) for d in (32, 64, 128)),
        (A100, 64, 32),
        (A100, 40, 72),
        (H100, 192, 128),
        (L4, 32, 128),
    ],
)
def test_published_tiles_are_exact(gpu: str, head_dim: int, head_dim_v: int) -> None:
    exact(judged(problem(heads_q=1, head_dim=head_dim, head_dim_v=head_dim_v, mask="causal"), gpu))


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("tile", [(64, 64), (64, 128), (128, 64), (128, 128)], ids=str)
def test_every_tile_is_exact_with_one_buffer_of_q_and_with_two(tile: tuple[int, int], stages: int) -> None:
    options = {"bwd_BLOCK_M": tile[0], "bwd_BLOCK_N": tile[1], "bwd_stages": stages}
    exact(judged(problem(seqlen_q=300, heads_q=1, mask="causal"), options=options))


@pytest.mark.parametrize(
    ("architecture", "tiles"),
    [
        ("ampere", {32: (128, 128, 2), 64: (128, 128, 2), 96: (64, 128, 2), 128: (64, 128, 2), 192: (64, 64, 2),
                    256: (64, 64, 1)}),
        ("hopper", {64: (128, 128, 2), 128: (64, 128, 2), 256: (64, 64, 2)}),
        ("ada", {32: (128, 128, 1), 64: (64, 128, 1), 96: (64, 128, 1), 128: (64, 64, 1)}),
    ],
)  # fmt: skip
def test_tiles_are_those_of_the_published_code(architecture: str, tiles: dict[int, tuple[int, int, int]]) -> None:
    """flash_bwd_launch_template.h, by the shared memory that there is: 164, 227 and 99 KB for a CTA."""
    for head_dim, tile in tiles.items():
        chosen = FA2.configure(problem(head_dim=head_dim), architecture, {})
        assert (chosen.bwd_BLOCK_M, chosen.bwd_BLOCK_N, chosen.bwd_stages) == tile


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_run_that_rounds_is_as_good_as_eager_attention(dtype: str, mask: str) -> None:
    found = judged(problem(dtype=dtype, mask=mask, head_dim=64), functional="dtype")
    assert found.accepted
    assert found.gradient_max_abs_error is not None
    assert min(found.gradient_max_abs_error.values()) > EXACT


# The backward pass alone, and after the forward pass.


def gradients(p: AttentionProblem) -> dict[str, Any]:
    on = device()
    tensors = run_tensors(p, *random_inputs(p, 3), random_do(p, 3))
    run_kernels(p, configured(load_schedule("fa2"), p, on, {}), on, 1410, Options(tensors=tensors))
    return tensors


def test_alone_it_computes_the_same_gradients() -> None:
    alone, both = (gradients(problem(direction=direction, mask="causal")) for direction in ("bwd", "fwd+bwd"))
    for name in ("O", "LSE", "dQ", "dK", "dV"):
        assert np.array_equal(alone[name], both[name])
    expected = attention_gradients_reference(alone["Q"], alone["K"], alone["V"], alone["dO"], "causal")
    for name, wanted in zip(("dQ", "dK", "dV"), expected, strict=True):
        np.testing.assert_allclose(alone[name], wanted, atol=EXACT)


@pytest.mark.parametrize("functional", [False, True])
def test_alone_only_its_kernels_are_timed(functional: bool) -> None:
    """Of heads that share keys, and of heads that do not."""
    names = ["fa2_bwd_preprocess", "fa2_bwd", "fa2_bwd_convert_dq", "fa2_bwd_sum_heads"]
    for heads_kv, kernels in ((1, names), (2, names[:3])):
        forward, alone, both = (
            simulate(problem(heads_kv=heads_kv, direction=direction), "fa2", device(), functional=functional, full=True)
            for direction in ("fwd", "bwd", "fwd+bwd")
        )
        assert [kernel.name for kernel in alone.kernels] == kernels
        assert [kernel.name for kernel in both.kernels] == ["fa2_fwd", *kernels]
        assert both.kernels == forward.kernels + alone.kernels
        assert both.flops == forward.flops + alone.flops
        assert alone.flops == forward.flops * 5 / 2
        assert both.flops_executed == forward.flops_executed + alone.flops_executed


def test_five_products_are_executed_for_each_tile() -> None:
    """Blocks of 128 keys and queries with head dim 64: all of them in full; under a causal mask, those it leaves."""
    tiles = {"full": 3 * 3, "causal": 3 + 2 + 1}
    for mask, visited in tiles.items():
        p = problem(seqlen_q=384, seqlen_k=384, head_dim=64, mask=mask)
        assert simulate(p, "fa2", device()).flops_executed == 2 * visited * 5 * 2 * 128 * 128 * 64


# Mistakes.


def changed(old: str, new: str = "pass") -> type[Schedule]:
    """fa2 with one piece of its backward pass replaced."""
    text = source_of(FA2Backward)
    assert text.count(old) == 1
    return _with_part(load_schedule("fa2"), FA2Backward, _load(text.replace(old, new), FA2Backward))


def noticed(schedule: type[Schedule], **fields: Any) -> str:
    """Gradients that are wrong, or the error that ends the run; nothing if all is accepted."""
    try:
        with np.errstate(all="ignore"):
            found = judged(problem(mask="causal", **fields), schedule=schedule, options=SMALL)
    except SimulationError as error:
        return type(error).__name__
    assert found.gradient_max_abs_error is not None
    wrong = [name for name, error in found.gradient_max_abs_error.items() if not error <= EXACT]
    assert found.accepted == (not wrong)
    return " ".join(wrong)


def test_the_text_as_it_is_is_right() -> None:
    assert noticed(changed("# 16: dK += dS^T Q_i", "# dK")) == ""


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ('wg.map("scale", r.like_Q, into=r.like_Q)', "pass", "dq"),
        ('wg.map("scale", r.dK, into=r.dK)', "pass", "dk"),
        ('wg.map("sub", r.dP, r.D, into=r.dP)', "pass", "dq dk"),
        ('wg.map("mul", r.dP, r.S, into=r.dP)', "pass", "dq dk"),
        ("if tile.partial(i):", "if False:", "dq dk dv"),
        ("if tile.partial(i):", "if i == tile.first:", "dq dk dv"),
        ("tile, i, 0, half(self.BLOCK_N)[0]", "tile, i, 0, 0", "dq dk dv"),
        ("for head in range(wg.problem.heads_per_kv)", "for head in range(1, wg.problem.heads_per_kv)", "dk dv"),
        ("each(head).rows(*mine)", "each(0).rows(*mine)", "dk dv"),
        ('wg.map("exp_lse", r.S, r.LSE, into=r.S)', 'wg.map("exp_lse", r.S, r.D, into=r.S)', "Race"),
        ("wg.gemm(s.dS, mine(s.K), into=r.dQ)", "wg.gemm(s.P, mine(s.K), into=r.dQ)", "dq"),
        ("wg.gemm(s.P.T, mine(s.dO), into=r.dV", "wg.gemm(s.dS.T, mine(s.dO), into=r.dV", "dv"),
        ("into=mine(tile.dQ_accum(i))", "into=mine(tile.dQ_accum(tile.first))", "dq"),
        ("wg.store(r.like_Q, into=tile.dQ_accum.rows(*mine))", "pass", "Hazard"),
        ("wg.atomic_add(r.dQ, into=mine(tile.dQ_accum(i)))", "wg.store(r.dQ, into=mine(tile.dQ_accum(i)))", "Race"),
    ],
)
def test_a_wrong_variant_is_noticed(old: str, new: str, wrong: str) -> None:
    assert noticed(changed(old, new)) == wrong


def test_without_shared_heads_nothing_is_summed_over_heads() -> None:
    """A mistake there cannot be seen then."""
    skips = changed("for head in range(wg.problem.heads_per_kv)", "for head in range(1, wg.problem.heads_per_kv)")
    assert noticed(skips, heads_kv=2) == ""


# Time and feasibility.


def with_l2(found: DeviceSpec, byte: int) -> DeviceSpec:
    return replace(found, memory=replace(found.memory, l2_share_byte=byte))


@pytest.mark.parametrize(
    ("gpu", "sms", "fields", "l2_byte"),
    [
        (A100, 2, {"mask": "causal"}, 0),
        (A100, 4, {"head_dim": 128}, 1 << 30),
        (H100, 3, {"mask": "causal", "heads_kv": 2}, 1 << 30),
        (L4, 2, {}, 0),
    ],
    ids=["A100 causal", "A100 128", "H100 causal", "L4"],
)
def test_the_fast_path(gpu: str, sms: int, fields: dict[str, Any], l2_byte: int) -> None:
    p = problem(**{"heads_q": 2, "heads_kv": 1, "seqlen_q": 512, "seqlen_k": 512, "head_dim": 64} | fields)
    on = with_l2(device(gpu, sms), l2_byte)
    fast, full = (simulate(p, "fa2", on, full=full) for full in (False, True))
    assert fast.ticks == pytest.approx(full.ticks, rel=0.03)
    assert fast.flops_executed == full.flops_executed
    counted = [name for name in full.hbm_bytes.tensors if l2_byte or name not in ("LSE", "D")]
    assert [fast.hbm_bytes.tensors[name] for name in counted] == [full.hbm_bytes.tensors[name] for name in counted]


def test_it_takes_two_to_four_times_as_long_as_the_forward_pass() -> None:
    """Five products for two, and a whole CTA that waits for itself more often."""
    p = problem(heads_kv=2, seqlen_q=1024, seqlen_k=1024, head_dim=64)
    forward, backward = (
        simulate(replace(p, direction=direction), "fa2", device(), full=True).ticks for direction in ("fwd", "bwd")
    )
    assert 2 <= backward / forward <= 4


def test_a_second_buffer_of_q_does_not_make_it_slower() -> None:
    p = problem(heads_kv=2, seqlen_q=640, seqlen_k=640, head_dim=64)
    one, two = (simulate(p, "fa2", device(), options={"bwd_stages": n}, full=True).ticks for n in (1, 2))
    assert two <= one


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"bwd_BLOCK_M": 32}, "schedule fa2: bwd_BLOCK_M = 32, allowed are 64 and 128"),
        ({"bwd_BLOCK_N": 96}, "schedule fa2: bwd_BLOCK_N = 96, allowed are 64 and 128"),
        ({"bwd_stages": 3}, "schedule fa2: bwd_stages = 3, allowed are 1 and 2"),
    ],
)
def test_what_the_backward_pass_cannot_be(options: dict[str, int], line: str) -> None:
    with pytest.raises(InputError) as error:
        simulate(problem(), "fa2", device(), options=options)
    assert error.value.problems[0].startswith(line)


def test_what_does_not_fit_is_refused_with_its_bytes() -> None:
    """Head dim 256 with 128 keys: K and V alone take 131072 bytes."""
    with pytest.raises(Infeasible, match=r"fa2_bwd with .* bytes of shared memory \(Q\[0\] 32768, K 65536, V 65536"):
        simulate(problem(head_dim=256), "fa2", device(A100), options={"bwd_BLOCK_N": 128})
