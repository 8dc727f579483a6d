"""HBM bytes of each schedule, tensor by tensor, against counts by hand where L2 holds nothing, or everything."""

from __future__ import annotations

import dataclasses

import pytest

from flashsim.devices import DeviceSpec, load_device
from flashsim.problem import AttentionProblem
from flashsim.result import Result
from flashsim.simulate import simulate

S, D, DV, HEADS, BATCH = 1000, 64, 32, 6, 2
PROBLEM = AttentionProblem(batch=BATCH, heads_q=HEADS, seqlen_q=S, head_dim=D, head_dim_v=DV)
HALF, FLOAT = 2, 4


def with_l2(name: str, byte: int) -> DeviceSpec:
    device = load_device(name)
    return dataclasses.replace(device, memory=dataclasses.replace(device.memory, l2_share_byte=byte))


def traffic(result: Result) -> dict[str, tuple[int, int]]:
    return {name: (moved.read, moved.written) for name, moved in result.hbm_bytes.tensors.items()}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("schedule", "gpu"), [("fa2", "a100-sxm4-80gb"), ("fa2", "h100-sxm5"), ("fa3", "h100-sxm5")])
def test_without_l2_every_query_block_reads_all_keys(schedule: str, gpu: str, full: bool) -> None:
    result = simulate(PROBLEM, schedule, with_l2(gpu, 0), options={"BLOCK_M": 128}, full=full)
    heads, blocks = BATCH * HEADS, -(-S // 128)
    assert traffic(result) == {
        "Q": (heads * S * D * HALF, 0),
        "K": (heads * blocks * S * D * HALF, 0),
        "V": (heads * blocks * S * DV * HALF, 0),
        "O": (0, heads * S * DV * HALF),
        "LSE": (0, heads * S * FLOAT),
    }
    assert result.hbm_bytes.read == sum(read for read, _ in traffic(result).values())
    assert result.hbm_bytes.written == sum(written for _, written in traffic(result).values())


@pytest.mark.parametrize("full", [True, False])
def test_with_l2_for_everything_each_byte_is_read_once(full: bool) -> None:
    for schedule in ("fa2", "fa3"):
        result = simulate(PROBLEM, schedule, with_l2("h100-sxm5", 1 << 30), full=full)
        moved = result.hbm_bytes
        assert moved.read + moved.written == PROBLEM.min_hbm_bytes
        assert result.peak_memory_bytes == PROBLEM.memory_bytes


HEADS_ALL, BLOCKS = BATCH * HEADS, -(-S // 128)
QK, VO, SCORES = HEADS_ALL * S * D * HALF, HEADS_ALL * S * DV * HALF, HEADS_ALL * S * S * HALF
"""Bytes of Q or K, of V or O, and of S or P, of all heads."""
FORWARD = {
    "Q": (QK, 0),
    "K": (QK, 0),
    "V": (VO, 0),
    "Q_heads": (QK, QK),  # copied; read by the product, a block of queries at a time
    "K_heads": (BLOCKS * QK, QK),  # read by each block of queries
    "V_heads": (BLOCKS * VO, VO),
    "S": (SCORES, SCORES),
    "P": (SCORES, SCORES),
    "O": (0, VO),
    "LSE": (0, HEADS_ALL * S * FLOAT),
}
BACKWARD = {
    "dO": ((1 + BLOCKS) * VO, 0),  # for dP once, for dV by each block of keys
    "V_heads": ((BLOCKS + 1) * VO, VO),  # for dP; then it is dV, which is permuted
    "P": (2 * SCORES, 0),  # for dV and the softmax
    "work": (SCORES, SCORES),  # dP
    "dS": (2 * SCORES, SCORES),
    "K_heads": ((BLOCKS + 2) * QK, 2 * QK),  # for dQ; then it is dK, which is scaled and permuted
    "Q_heads": ((BLOCKS + 1) * QK, QK),  # for dK; then it is dQ, which is permuted
    "dQ": (QK, 2 * QK),  # not scaled yet, and finally
    "dK": (0, QK),
    "dV": (0, VO),
}
MASKS = {
    "full": ({}, {}),
    "causal": ({"work": (SCORES, SCORES)}, {}),  # the scores, before the mask is added
    "padding:1000,900": (
        {"S": (2 * SCORES, 2 * SCORES)},  # filled in place
        # zero S; dS to S; S to dS; dS to P; P to S; fill S; S to dS
        {"S": (3 * SCORES, 4 * SCORES), "P": (3 * SCORES, SCORES), "dS": (4 * SCORES, 3 * SCORES)},
    ),
}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_standard_attention_moves_the_scores_again_and_again(mask: str, full: bool) -> None:
    for direction, plain, changed in zip(("fwd", "bwd"), (FORWARD, BACKWARD), MASKS[mask], strict=True):
        problem = dataclasses.replace(PROBLEM, mask=mask, direction=direction)
        result = simulate(problem, "standard", with_l2("h100-sxm5", 0), full=full)
        assert traffic(result) == plain | changed, direction


@pytest.mark.parametrize("full", [True, False])
def test_standard_attention_with_dropout(full: bool) -> None:
    """P~ takes the place of S, and in the backward pass dP that of P~ and dS that of dP~."""
    changed = (
        {"S": (2 * SCORES, 2 * SCORES), "kept": (0, SCORES // 2)},
        {"P": (SCORES, 0), "S": (2 * SCORES, SCORES), "work": (3 * SCORES, 2 * SCORES), "kept": (SCORES // 2, 0)},
    )
    for direction, plain, different in zip(("fwd", "bwd"), (FORWARD, BACKWARD), changed, strict=True):
        problem = dataclasses.replace(PROBLEM, dropout=0.1, direction=direction)
        expected = {name: moved for name, moved in (plain | different).items() if name != "dS"}
        assert traffic(simulate(problem, "standard", with_l2("h100-sxm5", 0), full=full)) == expected, direction


@pytest.mark.parametrize("full", [True, False])
def test_standard_attention_repeats_keys_and_values_of_grouped_heads(full: bool) -> None:
    """Each query head has its own copy, and its own gradient, which are then summed."""
    grouped = dataclasses.replace(PROBLEM, heads_kv=2)
    of_k, of_v = {"K_repeated": (QK, QK)}, {"V_repeated": (VO, VO)}
    given = {"K": (QK, 0), "V": (VO, 0)}  # read once for each query head
    result = simulate(grouped, "standard", with_l2("h100-sxm5", 0), full=full)
    assert traffic(result) == FORWARD | given | of_k | of_v
    result = simulate(dataclasses.replace(grouped, direction="bwd"), "standard", with_l2("h100-sxm5", 0), full=full)
    summed = {"dK": (0, QK // 3), "dV": (0, VO // 3)}
    assert traffic(result) == BACKWARD | summed | of_k | of_v


def test_memory_of_standard_attention() -> None:
    """Scores and P are there at the same time; with a backward pass dP and dS, too."""
    result = simulate(PROBLEM, "standard", "h100-sxm5")
    assert result.peak_memory_bytes == PROBLEM.memory_bytes + 2 * SCORES + 2 * QK + VO
    both = dataclasses.replace(PROBLEM, direction="fwd+bwd")
    assert simulate(both, "standard", "h100-sxm5").peak_memory_bytes == both.memory_bytes + 4 * SCORES + 2 * QK + VO
