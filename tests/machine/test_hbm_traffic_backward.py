"""HBM bytes of FlashAttention-2's backward pass, split-KV and fp8, tensor by tensor, against counts by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flashsim.devices import DeviceSpec, load_device
from flashsim.problem import AttentionProblem
from flashsim.result import Result
from flashsim.simulate import simulate

SQ, SK, D, DV, HEADS, KV_HEADS, BATCH = 500, 700, 64, 32, 4, 2, 2
M = N = 128
"""The tile of the backward pass at head dim 64."""
BLOCKS_M, BLOCKS_N = 4, 6
BACKWARD = AttentionProblem(
    batch=BATCH, heads_q=HEADS, heads_kv=KV_HEADS, seqlen_q=SQ, seqlen_k=SK, head_dim=D, head_dim_v=DV, direction="bwd"
)
HALF, FLOAT, EIGHT_BIT = 2, 4, 1
Q_ROWS, KEY_ROWS, KV_ROWS = BATCH * HEADS * SQ, BATCH * HEADS * SK, BATCH * KV_HEADS * SK
EVERYTHING = 1 << 30
FULL_OR_FAST = pytest.mark.parametrize("full", [True, False], ids=["full", "fast"])


def device(name: str, l2_byte: int, sms: int = 4) -> DeviceSpec:
    found = load_device(name)
    return replace(
        found, sm=replace(found.sm, count=sms), memory=replace(found.memory, l2_share_byte=l2_byte)
    )  # fmt: skip


def traffic(result: Result) -> dict[str, tuple[int, int]]:
    return {name: (moved.read, moved.written) for name, moved in result.hbm_bytes.tensors.items()}


def by_hand(visits: int, steps: int, expanded: bool) -> dict[str, tuple[int, int]]:
    """Without L2, `visits` being the rows of queries that blocks of keys visit, of all heads, and `steps` as much of
    LSE and D, which each of the two warpgroups loads for itself.

    preprocess loads O and dO, stores D and clears dQ_accum. The main kernel loads K and V once, and for each visit Q,
    dO, LSE and D, and adds to dQ_accum, which is a read and a write; it stores dK and dV, of each query head if heads
    share keys. convert_dq loads dQ_accum and stores dQ; sum_heads loads what was stored of each query head and stores
    the sums.
    """
    gradients = {
        name: (0, rows * width * HALF)
        for name, rows, width in (("dQ", Q_ROWS, D), ("dK", KV_ROWS, D), ("dV", KV_ROWS, DV))
    }
    parts = {"dK_expanded": 2 * (KEY_ROWS * D * HALF,), "dV_expanded": 2 * (KEY_ROWS * DV * HALF,)}
    once = Q_ROWS * D * FLOAT
    return {
        "Q": (visits * D * HALF, 0),
        "K": (KEY_ROWS * D * HALF, 0),
        "V": (KEY_ROWS * DV * HALF, 0),
        "O": (Q_ROWS * DV * HALF, 0),
        "dO": ((Q_ROWS + visits) * DV * HALF, 0),
        "LSE": (steps * FLOAT, 0),
        "D": (steps * FLOAT, Q_ROWS * FLOAT),
        "dQ_accum": (visits * D * FLOAT + once, once + visits * D * FLOAT),
        **gradients,
        **(parts if expanded else {}),
    }


def without(found: dict[str, tuple[int, int]], *names: str) -> dict[str, tuple[int, int]]:
    return {name: bytes for name, bytes in found.items() if name not in names}


@pytest.mark.parametrize("gpu", ["a100-sxm4-80gb", "h100-sxm5"])
@FULL_OR_FAST
def test_backward_without_l2_every_block_of_keys_reads_all_queries(gpu: str, full: bool) -> None:
    visits = BLOCKS_N * Q_ROWS
    expected = by_hand(visits, steps=2 * visits, expanded=True)
    found = traffic(simulate(BACKWARD, "fa2", device(gpu, 0), full=full))
    # The fast path takes what both warpgroups load of LSE and D for one load: rows of four bytes.
    rows = () if full else ("LSE", "D")
    assert without(found, *rows) == without(expected, *rows)
    assert found["D"][1] == expected["D"][1]
    assert expected["LSE"][0] / 2 <= found["LSE"][0] <= expected["LSE"][0]


@FULL_OR_FAST
def test_backward_without_l2_a_causal_mask_leaves_the_queries_that_see_a_block_of_keys(full: bool) -> None:
    """Queries 0 to 127 see keys up to 327: blocks 0 to 2; the next ones 0 to 3, 0 to 4 and, from 384 on, 0 to 5.

    With a head of keys for each of queries nothing is summed up over heads.
    """
    problem = replace(BACKWARD, heads_kv=HEADS, mask="causal")
    visits = BATCH * HEADS * (128 * (3 + 4 + 5) + (SQ - 384) * 6)
    expected = by_hand(visits, steps=2 * visits, expanded=False)
    expected |= {"dK": (0, KEY_ROWS * D * HALF), "dV": (0, KEY_ROWS * DV * HALF)}
    found = traffic(simulate(problem, "fa2", device("a100-sxm4-80gb", 0), full=full))
    rows = () if full else ("LSE", "D")
    assert without(found, *rows) == without(expected, *rows)


@pytest.mark.parametrize("mask", ["full", "causal"])
@FULL_OR_FAST
def test_backward_with_l2_for_everything_each_kernel_moves_each_byte_once(mask: str, full: bool) -> None:
    """K and V are then read once for a KV head; all additions to one block of dQ are one read and one write."""
    found = traffic(simulate(replace(BACKWARD, mask=mask), "fa2", device("a100-sxm4-80gb", EVERYTHING), full=full))
    expected = by_hand(Q_ROWS, steps=Q_ROWS, expanded=True)
    expected |= {"K": (KV_ROWS * D * HALF, 0), "V": (KV_ROWS * DV * HALF, 0)}
    assert found == expected


def test_the_workspace_of_a_backward_pass_is_device_memory() -> None:
    """D, dQ in fp32, and dK and dV of each query head."""
    result = simulate(BACKWARD, "fa2", device("a100-sxm4-80gb", EVERYTHING))
    workspace = Q_ROWS * (1 + D) * FLOAT + KEY_ROWS * (D + DV) * HALF
    assert result.peak_memory_bytes == BACKWARD.memory_bytes + workspace


# Split-KV.

DECODING = AttentionProblem(
    batch=BATCH, heads_q=HEADS, heads_kv=KV_HEADS, seqlen_q=5, seqlen_k=1000, head_dim=D, head_dim_v=DV
)
FEW, MANY = BATCH * HEADS * 5, BATCH * HEADS * 1000


@pytest.mark.parametrize(("kv_dtype", "width"), [("problem", HALF), ("fp8", EIGHT_BIT)])
@pytest.mark.parametrize("splits", [1, 3, 4])
@FULL_OR_FAST
def test_split_kv_writes_and_reads_each_part_once(full: bool, splits: int, kv_dtype: str, width: int) -> None:
    """Four KV tiles of 256: three splits of 2, 2 and none. K and V are read once for each block of queries, of each
    query head; Q by each split that has tiles; the parts, in fp32, are written by all of them."""
    options = {"num_splits": splits, "kv_dtype": kv_dtype}
    found = traffic(simulate(DECODING, "split_kv", device("h100-sxm5", 0), options=options, full=full))
    with_tiles = {1: 1, 3: 2, 4: 4}[splits]
    expected = {
        "Q": (with_tiles * FEW * D * HALF, 0),
        "K": (MANY * D * width, 0),
        "V": (MANY * DV * width, 0),
        "O": (0, FEW * DV * HALF),
        "LSE": (0, FEW * FLOAT),
    }
    if splits > 1:
        parts = splits * FEW
        expected |= {"O_partial": 2 * (parts * DV * FLOAT,), "LSE_partial": 2 * (parts * FLOAT,)}
    assert found == expected


@FULL_OR_FAST
def test_split_kv_with_packed_heads_reads_keys_once_for_a_kv_head(full: bool) -> None:
    options = {"num_splits": 4, "pack_gqa": True}
    found = traffic(simulate(DECODING, "split_kv", device("h100-sxm5", 0), options=options, full=full))
    assert found["K"] == (MANY * D * HALF * KV_HEADS // HEADS, 0)
    assert found["V"] == (MANY * DV * HALF * KV_HEADS // HEADS, 0)
    assert found["O_partial"] == 2 * (4 * FEW * DV * FLOAT,)


def test_parts_of_splits_are_device_memory_and_so_is_what_k_and_v_are_kept_in() -> None:
    gpu = device("h100-sxm5", EVERYTHING)
    for kv_dtype, width in (("problem", HALF), ("fp8", EIGHT_BIT)):
        result = simulate(DECODING, "split_kv", gpu, options={"num_splits": 3, "kv_dtype": kv_dtype})
        kv = BATCH * KV_HEADS * 1000 * (D + DV) * width
        outputs = FEW * (DV * HALF + FLOAT) + 3 * FEW * (DV + 1) * FLOAT
        assert result.peak_memory_bytes == FEW * D * HALF + kv + outputs


# fp8.


@pytest.mark.parametrize("incoherent", ["off", "fused", "separate"])
@FULL_OR_FAST
def test_fp8_moves_half_the_bytes_of_q_k_and_v(incoherent: str, full: bool) -> None:
    """Without L2, with tiles of 192 x 160; O is in 16 bits. A separate transform reads Q and K in 16 bits and writes
    them, with a scale for each block, in 8."""
    narrow = replace(BACKWARD, direction="fwd", dtype="fp8", head_dim_v=D)
    found = traffic(simulate(narrow, "fa3", device("h100-sxm5", 0), options={"incoherent": incoherent}, full=full))
    blocks = 3
    q, k = Q_ROWS * D, blocks * KEY_ROWS * D
    expected: dict[str, Any] = {
        "Q": (q, 0),
        "K": (k, 0),
        "V": (k, 0),
        "O": (0, Q_ROWS * D * HALF),
        "LSE": (0, Q_ROWS * FLOAT),
    }
    if incoherent == "separate":
        expected |= {
            "Q_16": (q * HALF, 0),
            "K_16": (KV_ROWS * D * HALF, 0),
            "Q_fp8": (q, q),
            "K_fp8": (k, KV_ROWS * D),
            "Q_scale": (0, BATCH * HEADS * 3 * FLOAT),
            "K_scale": (0, BATCH * KV_HEADS * 5 * FLOAT),
        }
        del expected["Q"], expected["K"]
    assert found == expected
    if incoherent == "off":
        tile = {"BLOCK_M": 192}
        wide = traffic(simulate(replace(narrow, dtype="bf16"), "fa3", device("h100-sxm5", 0), options=tile, full=full))
        assert all(wide[name] == (2 * found[name][0], 0) for name in "QKV")
        assert all(wide[name] == found[name] for name in ("O", "LSE"))
