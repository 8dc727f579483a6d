"""Split-KV decoding: into how many parts, exact whatever they are, and bound by memory where it must be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flashsim.check.example import Latencies
from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import InputError
from flashsim.machine.options import Options
from flashsim.numerics.functional import run_tensors
from flashsim.numerics.inputs import random_inputs
from flashsim.numerics.reference import attention_reference
from flashsim.numerics.rounding import round_to
from flashsim.problem import AttentionProblem
from flashsim.result import Result
from flashsim.schedules.split_kv import SplitKV, num_splits
from flashsim.simulate import configured, run_kernels, simulate

EXACT = 1e-9
A100, H100, L4 = "a100-sxm4-80gb", "h100-sxm5", "l4"
f32 = np.float32


def device(name: str = H100, sms: int = 2, **memory: int) -> DeviceSpec:
    found = load_device(name)
    return replace(found, sm=replace(found.sm, count=sms), memory=replace(found.memory, **memory))


def problem(**fields: Any) -> AttentionProblem:
    sizes = {"batch": 2, "heads_q": 2, "heads_kv": 1, "seqlen_q": 3, "seqlen_k": 250, "head_dim": 32, "head_dim_v": 24}
    return AttentionProblem(**sizes | fields)


def exact(p: AttentionProblem, on: DeviceSpec | None = None, **options: Any) -> Result:
    draw = options.pop("draw", None)
    result = simulate(p, "split_kv", on or device(), options={"BLOCK_N": 32} | options, functional=True, draw=draw)
    found = result.functional
    assert found is not None
    assert found.accepted
    assert max(found.max_abs_error, found.lse_max_abs_error) <= EXACT
    return result


# How many splits.


def published(batch_nheads_mblocks: int, num_sms: int, num_n_blocks: int, max_splits: int = 128) -> int:
    """num_splits_heuristic, statement by statement, in fp32 as there."""
    if batch_nheads_mblocks >= f32(0.8) * f32(num_sms):
        return 1
    max_splits = min(max_splits, num_sms, num_n_blocks)

    def is_split_eligible(n: int) -> bool:
        return n == 1 or -(-num_n_blocks // n) != -(-num_n_blocks // (n - 1))

    max_efficiency, efficiency = f32(0), []
    for n in range(1, max_splits + 1):
        if not is_split_eligible(n):
            efficiency.append(f32(0))
            continue
        n_waves = f32(batch_nheads_mblocks * n) / f32(num_sms)
        eff = n_waves / np.ceil(n_waves)
        max_efficiency = max(max_efficiency, eff)
        efficiency.append(eff)
    for n in range(1, max_splits + 1):
        if is_split_eligible(n) and float(efficiency[n - 1]) >= 0.85 * float(max_efficiency):
            return n
    return 1


def test_the_example_of_the_published_rule() -> None:
    """48 tiles on 108 SMs: 2 splits, which keep 0.89 of the SMs busy, not 3, which keep 0.67."""
    assert num_splits(48, 64, 108) == 2
    assert published(48, 108, 64) == 2


def test_a_number_of_splits_that_shortens_none_is_not_chosen() -> None:
    """Of 64 KV tiles, 12 splits would be 11: the longest has 6 either way. So the best is not 12 of 9 tiles each, one
    full wave, but 11, and 10 (0.83 of the slots) are 85 % of that (0.92); of 128 KV tiles, 12 count, and 11 it is."""
    assert num_splits(9, 64, 108) == published(9, 108, 64) == 10
    assert num_splits(9, 128, 108) == published(9, 108, 128) == 11


@pytest.mark.parametrize(
    ("tiles", "slots", "splits"),
    [
        (87, 108, 1),  # 80 % of the slots
        (86, 108, 5),  # 4 waves, 0.995 of them busy; up to 4 splits, 0.796 are
        (54, 108, 2),
        (1, 132, 114),  # 128 would keep 0.97 busy; from 109 on it is 85 % of that, 114 leaves 9 tiles a split for 10
    ],
)
def test_splits_by_the_tiles_that_there_are(tiles: int, slots: int, splits: int) -> None:
    assert num_splits(tiles, 1024, slots) == splits


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([116, 216, 264, 5, 1]))
@example(4, 300, 5)  # exactly 80 %
def test_the_rule_is_the_published_one(tiles: int, kv_tiles: int, slots: int) -> None:
    assert num_splits(tiles, kv_tiles, slots) == published(tiles, slots, kv_tiles)


@pytest.mark.parametrize(
    ("fields", "options", "tiles"),
    [
        ({"batch": 1, "heads_q": 32, "heads_kv": 8, "seqlen_q": 1}, {}, 32),
        ({"batch": 1, "heads_q": 32, "heads_kv": 8, "seqlen_q": 1}, {"pack_gqa": True}, 8),
        ({"batch": 3, "heads_q": 8, "heads_kv": 2, "seqlen_q": 100}, {}, 48),
        ({"batch": 3, "heads_q": 8, "heads_kv": 2, "seqlen_q": 100}, {"pack_gqa": True}, 42),
        ({"batch": 3, "heads_q": 8, "heads_kv": 2, "seqlen_q": 100}, {"BLOCK_M": 128}, 24),
    ],
)
def test_two_ctas_fit_an_sm(fields: dict[str, int], options: dict[str, Any], tiles: int) -> None:
    p = problem(**fields, seqlen_k=16384, head_dim=128, head_dim_v=128)
    for architecture, sms in (("hopper", 132), ("ampere", 108)):
        chosen = SplitKV.configure(p, architecture, options, sms)
        assert chosen.num_splits == published(tiles, 2 * sms, 128)
        assert chosen.options() | {"num_splits": None} == chosen.options() | {**options, "num_splits": None}


def test_more_splits_than_kv_tiles_are_refused() -> None:
    for splits, line in ((8, None), (9, "schedule split_kv: num_splits = 9, there are 8 KV tiles to split")):
        options = {"BLOCK_N": 32, "num_splits": splits}
        if line is None:
            assert SplitKV.configure(problem(), "hopper", options).num_splits == splits
            continue
        with pytest.raises(InputError) as error:
            SplitKV.configure(problem(), "hopper", options)
        assert error.value.problems == (line,)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"BLOCK_M": 32}, "BLOCK_M = 32, allowed are 64 and 128"),
        ({"BLOCK_N": 24}, "BLOCK_N = 24, allowed are the multiples of 16"),
        ({"layers": 65}, "layers = 65, allowed are 1 to 64"),
    ],
)
def test_what_it_cannot_be(options: dict[str, int], line: str) -> None:
    with pytest.raises(InputError, match=f"schedule split_kv: {line}"):
        SplitKV.configure(problem(), "hopper", options)


def test_only_a_forward_pass() -> None:
    with pytest.raises(InputError, match="schedule split_kv has no direction 'bwd'"):
        SplitKV.configure(problem(direction="bwd"), "hopper", {})


def test_one_split_needs_no_combine_kernel() -> None:
    one, two = (exact(problem(), num_splits=n) for n in (1, 2))
    assert [kernel.name for kernel in one.kernels] == ["split_kv_fwd"]
    assert [kernel.name for kernel in two.kernels] == ["split_kv_fwd", "split_kv_combine"]
    assert not {"O_partial", "LSE_partial"} & one.hbm_bytes.tensors.keys()


# Numbers.


@pytest.mark.parametrize("splits", [2, 5, 7, 8])
@pytest.mark.parametrize("mask", ["full", "causal", "window:70,1", "padding:250,33"])
def test_exact_whatever_the_splits(mask: str, splits: int) -> None:
    """Eight KV tiles; 5 splits leave the last one none, 7 the last three. Behind a window, most splits see nothing."""
    exact(problem(mask=mask), num_splits=splits)


@pytest.mark.parametrize("seqlen_q", range(1, 17))
def test_exact_for_a_few_queries(seqlen_q: int) -> None:
    exact(problem(seqlen_q=seqlen_q, mask="causal", batch=1), num_splits=3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1), (40, 2)], ids=str)
def test_exact_with_shared_heads(heads: tuple[int, int], packed: bool) -> None:
    """40 heads that share 2, packed, with 4 queries: 80 rows, more than a tile."""
    p = problem(batch=1, heads_q=heads[0], heads_kv=heads[1], seqlen_q=4, mask="causal")
    exact(p, num_splits=3, pack_gqa=packed)


@pytest.mark.parametrize(
    "sizes",
    [
        {"seqlen_k": 1},
        {"seqlen_k": 1, "seqlen_q": 5},
        {"mask": "causal", "seqlen_q": 90, "seqlen_k": 40},
        {"seqlen_q": 130, "mask": "causal"},
        {"mask": "varlen:0,130", "seqlen_q": 130, "seqlen_k": 130},
        {"mask": "varlen:0,0", "seqlen_q": 130, "seqlen_k": 130},
        {"mask": "varlen-causal:130,0", "seqlen_q": 130, "seqlen_k": 130},
        {"mask": "documents:40+90", "seqlen_q": 130, "seqlen_k": 130},
    ],
    ids=str,
)
def test_exact_at_the_edges(sizes: dict[str, Any]) -> None:
    """Rows that see no key get 0 and -inf from splits that all say so."""
    p = problem(**sizes)
    exact(p, num_splits=min(2, -(-p.seqlen_k // 32)))


@pytest.mark.parametrize(("gpu", "head_dim"), [(A100, 64), (A100, 128), (H100, 256), (L4, 64), (L4, 128)])
def test_published_tiles_are_exact(gpu: str, head_dim: int) -> None:
    p = problem(batch=1, head_dim=head_dim, head_dim_v=head_dim, seqlen_k=600)
    found = simulate(p, "split_kv", device(gpu), options={"num_splits": 2}, functional=True).functional
    assert found is not None
    assert found.accepted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kv_dtype", ["problem", "fp8"])
def test_exact_whatever_the_latencies(kv_dtype: str, seed: int) -> None:
    latencies = Latencies(tuple((kind, "random") for kind in ("memory", "link", "smem", "tensor", "barrier")), seed)
    exact(problem(mask="causal"), num_splits=3, kv_dtype=kv_dtype, draw=latencies.draw())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kv_dtype", ["problem", "fp8"])
def test_a_run_that_rounds_is_accepted(dtype: str, kv_dtype: str) -> None:
    options = {"num_splits": 3, "BLOCK_N": 32, "kv_dtype": kv_dtype}
    found = simulate(problem(dtype=dtype), "split_kv", device(), options=options, functional="dtype").functional
    assert found is not None
    assert found.accepted
    assert found.max_abs_error > EXACT


def test_of_k_and_v_in_8_bits_what_is_kept_is_attended_to() -> None:
    p, on = problem(), device()
    q, k, v = random_inputs(p, 1)
    tensors = run_tensors(p, q, k, v)
    chosen = configured(SplitKV, p, on, {"BLOCK_N": 32, "num_splits": 3, "kv_dtype": "fp8"})
    run_kernels(p, chosen, on, 1500, Options(tensors=tensors))
    kept, wanted = (attention_reference(q, *kv)[0] for kv in ((round_to(k, "e4m3"), round_to(v, "e4m3")), (k, v)))
    assert np.abs(tensors["O"] - kept).max() <= EXACT
    assert np.abs(tensors["O"] - wanted).max() > 1e-3
    # What saturates is the largest number of e4m3, not NaN.
    tensors = run_tensors(p, q, 1000 * k, v)
    run_kernels(p, chosen, on, 1500, Options(tensors=tensors))
    assert np.abs(tensors["K"]).max() == 448
    assert np.isfinite(tensors["O"]).all()


# Time.


def many(batch: int, seqlen: int, heads: int = 32, **fields: int) -> AttentionProblem:
    return AttentionProblem(**{"batch": batch, "heads_q": heads, "seqlen_q": 1, "seqlen_k": seqlen, "head_dim": 128}
                            | fields)  # fmt: skip


@pytest.mark.parametrize("gpu", [A100, H100, L4])
def test_a_large_batch_is_bound_by_hbm(gpu: str) -> None:
    on = load_device(gpu)
    result = simulate(many(batch=32, seqlen=4096), "split_kv", on)
    moved = result.hbm_bytes.read + result.hbm_bytes.written
    assert result.bound_by == "hbm"
    assert moved == many(batch=32, seqlen=4096).min_hbm_bytes
    assert 1 <= result.time_us / (moved / on.memory.hbm_byte_per_ns / 1000) <= 1.15


def test_few_queries_are_faster_with_splits() -> None:
    """8 work tiles for 132 SMs."""
    one, chosen = (
        simulate(many(batch=1, seqlen=8192, heads=8), "split_kv", H100, options=options).time_us
        for options in ({"num_splits": 1}, {})
    )
    assert one > 3 * chosen


def test_k_and_v_in_8_bits_take_half_the_traffic() -> None:
    wide, narrow = (
        simulate(many(batch=4, seqlen=4096), "split_kv", H100, options={"kv_dtype": kv}) for kv in ("problem", "fp8")
    )
    assert narrow.hbm_bytes.tensors["K"].read * 2 == wide.hbm_bytes.tensors["K"].read
    assert narrow.time_us < wide.time_us


@pytest.mark.parametrize(("seqlen", "fits"), [(1024, True), (8192, False)])
def test_a_second_layer_is_cheaper_if_l2_has_kept_k_and_v(seqlen: int, fits: bool) -> None:
    """4 MiB fit a share of 25 MiB of L2, 32 MiB do not: the least recently used leave first, and all are gone."""
    p = many(batch=2, seqlen=seqlen, heads=4)
    result = simulate(p, "split_kv", H100, options={"layers": 2})
    first, second = (kernel.ticks for kernel in result.kernels if kernel.name == "split_kv_fwd")
    kv = p.tensor_bytes["k"]
    assert result.hbm_bytes.tensors["K"].read == result.hbm_bytes.tensors["V"].read == (kv if fits else 2 * kv)
    assert (second < first) if fits else (second == first)


def test_each_layer_is_launched() -> None:
    one, three = (exact(problem(batch=1), num_splits=2, layers=n) for n in (1, 3))
    assert [kernel.name for kernel in three.kernels] == 3 * [kernel.name for kernel in one.kernels]
    assert three.flops_executed == 3 * one.flops_executed
    assert three.options["layers"] == 3


@pytest.mark.parametrize("kv_dtype", ["problem", "fp8"])
def test_the_fast_path(kv_dtype: str) -> None:
    options = {"kv_dtype": kv_dtype}
    fast, full = (
        simulate(many(batch=2, seqlen=4096, heads=16), "split_kv", H100, options=options, full=full)
        for full in (False, True)
    )
    assert fast.ticks == pytest.approx(full.ticks, rel=0.03)
    assert fast.hbm_bytes == full.hbm_bytes
