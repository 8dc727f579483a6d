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


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_standard_attention_moves_the_scores_again_and_again(mask: str, full: bool) -> None:
    """S is written, read and written by the mask's kernel, read by the softmax; P is written and read. K is read by
    each block of queries, V too; Q, and S and P, once by each kernel that needs them."""
    problem = dataclasses.replace(PROBLEM, mask=mask)
    result = simulate(problem, "standard", with_l2("h100-sxm5", 0), full=full)
    heads, blocks = BATCH * HEADS, -(-S // 128)
    scores, masked = heads * S * S * HALF, mask != "full"
    assert traffic(result) == {
        "Q": (heads * S * D * HALF, 0),
        "K": (heads * blocks * S * D * HALF, 0),
        "V": (heads * blocks * S * DV * HALF, 0),
        "S": (scores * (1 + masked), scores * (1 + masked)),
        "P": (scores, scores),
        "O": (0, heads * S * DV * HALF),
        "LSE": (0, heads * S * FLOAT),
    }
    assert result.peak_memory_bytes == problem.memory_bytes + 2 * scores
