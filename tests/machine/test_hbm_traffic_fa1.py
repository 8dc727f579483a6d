"""HBM bytes of FlashAttention-1, tensor by tensor, against counts by hand where L2 holds nothing."""

from __future__ import annotations

import dataclasses

import pytest

from flashsim.devices import DeviceSpec, load_device
from flashsim.problem import AttentionProblem
from flashsim.result import Result
from flashsim.simulate import simulate

HALF, FLOAT = 2, 4
D, DV, HEADS, SQ = 64, 32, 3, 72


def without_l2() -> DeviceSpec:
    device = load_device("a100-sxm4-40gb")
    return dataclasses.replace(device, memory=dataclasses.replace(device.memory, l2_share_byte=0))


def moved(result: Result) -> dict[str, tuple[int, int]]:
    return {name: (tensor.read, tensor.written) for name, tensor in result.hbm_bytes.tensors.items()}


def forward(build: str, seqlen_k: int, blocks: int) -> dict[str, tuple[int, int]]:
    """Bytes of one head, (read, written), where `blocks` blocks of keys go past every block of queries."""
    counted = {"Q": (blocks * SQ * D * HALF, 0), "K": (seqlen_k * D * HALF, 0), "V": (seqlen_k * DV * HALF, 0)}
    rows_of_O, LSE = SQ * DV, SQ * FLOAT
    if build == "paper":  # given a value before, read and written at every step
        half = rows_of_O * HALF
        return counted | {"O": (blocks * half, (blocks + 1) * half), "LSE": (blocks * LSE, (blocks + 1) * LSE)}
    counted |= {"O": (0, rows_of_O * HALF), "LSE": ((blocks - 1) * LSE, blocks * LSE)}
    if blocks > 1:  # not read at the first step, read once more in the end
        counted["O_tmp"] = (blocks * rows_of_O * FLOAT, blocks * rows_of_O * FLOAT)
    return counted


def backward(build: str, seqlen_k: int, blocks: int) -> dict[str, tuple[int, int]]:
    dO, dQ, rows = SQ * DV * HALF, SQ * D, SQ * FLOAT
    counted = {
        "Q": (blocks * SQ * D * HALF, 0),
        "K": (seqlen_k * D * HALF, 0),
        "V": (seqlen_k * DV * HALF, 0),
        "dO": (blocks * dO, 0),
        "LSE": (blocks * rows, 0),
        "dK": (0, seqlen_k * D * HALF),
        "dV": (0, seqlen_k * DV * HALF),
    }
    if build == "paper":  # D follows from O at every step
        return counted | {"O": (blocks * dO, 0), "dQ": (blocks * dQ * HALF, (blocks + 1) * dQ * HALF)}
    counted |= {"O": (dO, 0), "dQ": (0, dQ * HALF)}
    if blocks > 1:  # D follows from O at the first step
        counted |= {"D": ((blocks - 1) * rows, rows), "dQ_tmp": (blocks * dQ * FLOAT, blocks * dQ * FLOAT)}
    return counted


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("build", "seqlen_k", "blocks"),
    [("2022-05", 600, 3), ("2022-05", 512, 2), ("2022-05", 250, 1), ("paper", 500, 3), ("paper", 150, 1)],
)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_without_l2_every_step_goes_to_hbm(direction: str, build: str, seqlen_k: int, blocks: int, full: bool) -> None:
    problem = AttentionProblem(
        batch=1, heads_q=HEADS, seqlen_q=SQ, seqlen_k=seqlen_k, head_dim=D, head_dim_v=DV, direction=direction
    )
    result = simulate(problem, "fa1", without_l2(), options={"build": build}, full=full)
    of_head = (forward if direction == "fwd" else backward)(build, seqlen_k, blocks)
    assert moved(result) == {name: (HEADS * read, HEADS * written) for name, (read, written) in of_head.items()}


def test_what_a_mask_skips_does_not_move() -> None:
    """Each query sees one of two blocks of keys, so no step is the second one of its queries."""
    problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=512, head_dim=64, mask="documents:256+256")
    result = simulate(problem, "fa1", without_l2(), full=True)
    assert moved(result)["Q"] == (512 * 64 * HALF, 0)
    # What the queries of the second document find has been put there by a kernel before.
    assert moved(result)["O_tmp"] == (2 * 512 * 64 * FLOAT, 2 * 512 * 64 * FLOAT)


def test_the_papers_example() -> None:
    """Figure 2 (left), GPT-2 medium: 64 x 16 heads, forward and backward. Algorithms 1 and 4 with four blocks of keys:
    K and V are read, dK and dV written, once, and with each block Q and O (read and written) forward, Q, O, dO and dQ
    (read and written) backward. Each is 134 MB over all heads, which makes 5.1 GB; and there are the statistics."""
    problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=1024, head_dim=64, direction="fwd+bwd")
    tile = {"build": "paper", "BLOCK_M": 32, "BLOCK_N": 256, "bwd_BLOCK_M": 16, "bwd_BLOCK_N": 256}
    result = simulate(problem, "fa1", without_l2(), options=tile, full=True)
    tensor, rows, blocks = 1024 * 64 * HALF, 1024 * FLOAT, 4
    algorithms = (2 + 3 * blocks) + (4 + 5 * blocks)
    assert 64 * 16 * algorithms * tensor == pytest.approx(5.1e9, rel=0.01)
    prepared = 2 * tensor + rows  # O and L, and dQ, before
    assert result.hbm_bytes.read + result.hbm_bytes.written == algorithms * tensor + 3 * blocks * rows + prepared
