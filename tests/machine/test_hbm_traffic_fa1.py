"""HBM bytes of FlashAttention-1, tensor by tensor, against counts by hand where L2 holds nothing."""

from __future__ import annotations

import dataclasses

import pytest

from flashsim.devices import DeviceSpec, load_device
from flashsim.problem import AttentionProblem
from flashsim.result import Result
from flashsim.simulate import simulate

HALF, FLOAT = 2, 4
D, DV, HEADS, SQ = 64, 32, 3, 200
GPT2_MEDIUM = AttentionProblem(batch=64, heads_q=16, seqlen_q=1024, head_dim=64, direction="fwd+bwd")
"""The example of figure 2 (left) of the paper."""


def without_l2() -> DeviceSpec:
    device = load_device("a100-sxm4-40gb")
    return dataclasses.replace(device, memory=dataclasses.replace(device.memory, l2_share_byte=0))


def moved(result: Result) -> dict[str, tuple[int, int]]:
    return {name: (tensor.read, tensor.written) for name, tensor in result.hbm_bytes.tensors.items()}


def forward(build: str, seqlen_k: int, blocks: int) -> dict[str, tuple[int, int]]:
    """Bytes of one head, (read, written), where `blocks` blocks of keys go past every block of queries."""
    counted = {"Q": (blocks * SQ * D * HALF, 0), "K": (seqlen_k * D * HALF, 0), "V": (seqlen_k * DV * HALF, 0)}
    O, LSE = SQ * DV, SQ * FLOAT
    if build == "paper":  # given a value before, read and written at every step
        return counted | {"O": (blocks * O * HALF, (blocks + 1) * O * HALF), "LSE": (blocks * LSE, (blocks + 1) * LSE)}
    counted |= {"O": (0, O * HALF), "LSE": ((blocks - 1) * LSE, blocks * LSE)}
    if blocks > 1:  # not read at the first step, read once more in the end
        counted["O_tmp"] = (blocks * O * FLOAT, blocks * O * FLOAT)
    return counted


def backward(build: str, seqlen_k: int, blocks: int) -> dict[str, tuple[int, int]]:
    O, dQ, rows = SQ * DV * HALF, SQ * D, SQ * FLOAT
    counted = {
        "Q": (blocks * SQ * D * HALF, 0),
        "K": (seqlen_k * D * HALF, 0),
        "V": (seqlen_k * DV * HALF, 0),
        "dO": (blocks * O, 0),
        "LSE": (blocks * rows, 0),
        "dK": (0, seqlen_k * D * HALF),
        "dV": (0, seqlen_k * DV * HALF),
    }
    if build == "paper":  # D follows from O at every step
        return counted | {"O": (blocks * O, 0), "dQ": (blocks * dQ * HALF, (blocks + 1) * dQ * HALF)}
    counted |= {"O": (O, 0), "dQ": (0, dQ * HALF)}
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
    """Algorithms 1 and 4 with four blocks of keys: each is 134 MB over all heads, K and V are read, dK and dV written,
    once, Q and O (read and written) four times forward, Q, O, dO and dQ (read and written) backward; 5.1 GB, and the
    statistics."""
    tile = {"build": "paper", "BLOCK_M": 64, "BLOCK_N": 256, "bwd_BLOCK_M": 16, "bwd_BLOCK_N": 256}
    result = simulate(GPT2_MEDIUM, "fa1", without_l2(), options=tile | {"BLOCK_M": 32})
    tensor, rows, blocks = 64 * 16 * 1024 * 64 * HALF, 64 * 16 * 1024 * FLOAT, 4
    algorithms = (2 + 3 * blocks) + (4 + 5 * blocks)
    assert algorithms * tensor == pytest.approx(5.1e9, rel=0.01)
    prepared = 2 * tensor + rows  # O and L, and dQ, before
    assert result.hbm_bytes.read + result.hbm_bytes.written == algorithms * tensor + 3 * blocks * rows + prepared
