"""Every kind of mask in every schedule: exact, skipped blocks skipped, and the fast path as good as for the others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import InputError
from flashsim.masks import SPELLING
from flashsim.problem import AttentionProblem
from flashsim.schedules import load_schedule, schedule_names
from flashsim.simulate import simulate

BLOCKS = "48 80\n0\n0 2\n\n1\n0 1 2\n"
"""The third row of blocks sees nothing."""
MASKS = {
    "full": "full",
    "causal": "causal",
    "window": "window:70,10",
    "prefix": "prefix:100",
    "chunked": "chunked:90",
    "documents": "documents:3+150+77",
    "global": "global:20+window:50,5",
    "blocks": "blocks:{folder}/blocks.txt",
    "butterfly": "butterfly:64",
    "padding": "padding:0,201",
    "varlen": "varlen:0,201",
    "varlen-causal": "varlen-causal:150,201",
}
SMALL: dict[str, dict[str, int]] = {
    "fa3": {"BLOCK_M": 64, "BLOCK_N": 32},
    "fa2": {"BLOCK_M": 64, "BLOCK_N": 32},
    "fa1": {},
    "split_kv": {"BLOCK_M": 64, "BLOCK_N": 32},
    "standard": {},
}


def problem(mask: str, folder: Path, seqlen: int = 230, **fields: int) -> AttentionProblem:
    (folder / "blocks.txt").write_text(BLOCKS, encoding="utf-8")
    sizes = {"batch": 2, "heads_q": 2, "heads_kv": 1, "seqlen_q": seqlen, "head_dim": 16} | fields
    return AttentionProblem(**sizes, mask=mask.format(folder=folder))


@pytest.fixture(scope="module")
def two_sms() -> DeviceSpec:
    device = load_device("h100-sxm5")
    return dataclasses.replace(device, sm=dataclasses.replace(device.sm, count=2))


def test_no_kind_is_left_out() -> None:
    assert MASKS.keys() == SPELLING.keys()
    for name in schedule_names():
        assert load_schedule(name).masks == tuple(SPELLING)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("schedule", schedule_names())
def test_exact(schedule: str, kind: str, two_sms: DeviceSpec, tmp_path: Path) -> None:
    p = problem(MASKS[kind], tmp_path)
    found = simulate(p, schedule, two_sms, options=SMALL[schedule], functional=True).functional
    assert found is not None
    assert found.accepted


@pytest.mark.parametrize("kind", MASKS)
def test_only_visited_tiles_are_computed(kind: str, two_sms: DeviceSpec, tmp_path: Path) -> None:
    """The tensor cores' work is that of the tiles that the masks let through, and of nothing else."""
    p = problem(MASKS[kind], tmp_path)
    whole = problem("full", tmp_path)
    options = SMALL["fa3"] | {"P_in_shared": False}
    masked, full = (simulate(one, "fa3", two_sms, options=options, full=True) for one in (p, whole))
    busy = [result.utilization["tensor"].elapsed * result.ticks for result in (masked, full)]
    assert busy[0] / busy[1] == pytest.approx(masked.flops_executed / full.flops_executed)
    assert masked.flops == p.flops <= masked.flops_executed


@pytest.mark.parametrize("mask", ["window:256", "window:700,300", "prefix:500", "chunked:512", "documents:300+724+1024",
                                  "global:100+window:200,200", "butterfly", "padding", "padding:2048,77"])  # fmt: skip
@pytest.mark.parametrize(("schedule", "tolerance"), [("fa3", 0.005), ("fa2", 0.05)])
def test_the_fast_path(mask: str, schedule: str, tolerance: float, tmp_path: Path) -> None:
    device, share = load_device("h100-sxm5"), 4 / 132
    memory = dataclasses.replace(
        device.memory,
        hbm_byte_per_ns=device.memory.hbm_byte_per_ns * share,
        l2_byte_per_ns=device.memory.l2_byte_per_ns * share,
        l2_share_byte=int(device.memory.l2_share_byte * share),
    )
    launch = dataclasses.replace(device.launch, cta_interval_ns=device.launch.cta_interval_ns / share)
    device = dataclasses.replace(device, sm=dataclasses.replace(device.sm, count=4), memory=memory, launch=launch)
    p = problem(mask, tmp_path, seqlen=2048, heads_q=4, heads_kv=4, head_dim=128)
    fast, full = (simulate(p, schedule, device, full=full) for full in (False, True))
    assert fast.ticks == pytest.approx(full.ticks, rel=tolerance)
    assert fast.hbm_bytes.read == pytest.approx(full.hbm_bytes.read, rel=0.15)


def test_a_block_list_that_changes_later_does_not_change_a_problem(tmp_path: Path) -> None:
    p = problem(MASKS["blocks"], tmp_path)
    pairs = p.allowed_pairs
    (tmp_path / "blocks.txt").write_text("48 80\n" + "0\n" * 5, encoding="utf-8")
    assert p.allowed_pairs == pairs
    assert dataclasses.replace(p).allowed_pairs < pairs


def test_mistakes_in_a_block_list_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 5 rows of 48 queries, and 300 queries need 7"):
        problem(MASKS["blocks"], tmp_path, seqlen=300)
