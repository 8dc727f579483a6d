"""What is charged for one tile of an inner loop, against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest

from flashsim.analysis.charges import charges
from flashsim.devices import load_device
from flashsim.problem import AttentionProblem


def problem(head_dim: int = 128, **others: Any) -> AttentionProblem:
    return AttentionProblem(**{"batch": 1, "heads_q": 1, "seqlen_q": 1, "head_dim": head_dim} | others)


def test_fa2_on_ampere() -> None:
    """128 x 64, four warps of 32 rows: 64 scores and 128 columns of O a thread, and 4 rows that it shares with three
    others: one factor each, of which it computes 1 of every 32 rows."""
    (one,) = charges("fa2", problem(), load_device("a100-sxm4-80gb")).values()
    assert (one.BLOCK_M, one.BLOCK_N, one.warps) == (128, 64, 4)
    assert one.mma_flop == 2 * 2 * 128 * 64 * 128
    assert one.load_byte == 2 * 64 * 128 * 2
    # exp, scale and subtract, sum, rescale O: 64 + 64 + 64 + 128 ... and alpha, l of 4 rows.
    assert one.instructions["exp"] == 64 + 4
    assert one.instructions["fma"] == 64 + 64 + 128 + 2 * 4
    assert one.instructions["alu"] == 64
    assert one.instructions["pack"] == 32
    assert one.instructions["issue"] == 68 + 264 + 64 + 32 + 60
    assert one.copies == 0


def test_fa3_loads_by_tma() -> None:
    device = load_device("h100-sxm5")
    (one,) = charges("fa3", problem(), device, {"BLOCK_M": 128, "BLOCK_N": 128}).values()
    assert (one.warps, one.copies) == (8, 2)
    assert one.mma_flop == 2 * 2 * 128 * 128 * 128
    assert one.load_byte == 2 * 128 * 128 * 2
    assert one.instructions["exp"] == 64 + 2


def test_a_pipe_that_packs_too_is_counted_apart() -> None:
    """On some devices conversions and exponentials share a pipe; they are counted as what they are."""
    counts = [
        charges("fa3", problem(64), load_device(gpu), {"BLOCK_M": 128, "BLOCK_N": 128})["fa3_fwd"].instructions
        for gpu in ("h100-sxm5", "h200-sxm")
    ]
    assert counts[0] == counts[1]
    assert counts[0]["pack"] == 32


def test_the_backward_pass_walks_queries() -> None:
    """Five products a step."""
    found = charges("fa2", problem(direction="bwd"), load_device("a100-sxm4-80gb"))
    assert list(found) == ["fa2_bwd"]
    assert found["fa2_bwd"].mma_flop == 5 * 2 * 64 * 128 * 128


@pytest.mark.parametrize("schedule", ["standard", "fa1", "split_kv"])
def test_all_schedules_can_be_asked(schedule: str) -> None:
    found = charges(schedule, problem(64), load_device("a100-sxm4-80gb"))
    assert all(one.load_byte > 0 for one in found.values())
