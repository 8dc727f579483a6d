"""FlashAttention-1 in both builds: exact, forward and backward; bound by what its loop order and its warps cost."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashsim.devices import DeviceSpec, load_device
from flashsim.engine import Completion, Simulation
from flashsim.errors import InputError, Race, SimulationError
from flashsim.machine.buffers import Buffer, View
from flashsim.machine.costs import DROPOUT_INSTRUCTIONS, Costs
from flashsim.machine.feasibility import fit
from flashsim.machine.operations import plan
from flashsim.machine.products import AsyncProduct
from flashsim.problem import AttentionProblem
from flashsim.schedules import fa1, fa1_backward
from flashsim.schedules.fa1 import FA1
from flashsim.schedules.fa1_backward import begins_alike
from flashsim.simulate import simulate

COSTS = Costs(load_device("a100-sxm4-80gb"), 1410)
WARP: Any = SimpleNamespace(sm=SimpleNamespace(costs=COSTS))
BUILDS = ("paper", "2022-05")
MASKS = (
    "full",
    "causal",
    "window:70,10",
    "prefix:50",
    "chunked:90",
    "global:20+window:50,5",
    "butterfly:64",
    "padding:0",
)


def with_sms(name: str, count: int) -> DeviceSpec:
    device = load_device(name)
    return dataclasses.replace(device, sm=dataclasses.replace(device.sm, count=count))


def problem(**fields: Any) -> AttentionProblem:
    return AttentionProblem(**{"batch": 1, "heads_q": 1, "seqlen_q": 64, "head_dim": 64} | fields)


@st.composite
def problems(draw: st.DrawFn) -> AttentionProblem:
    heads_kv, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    return AttentionProblem(
        batch=1,
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        seqlen_q=draw(st.sampled_from([1, 15, 16, 31, 67])),
        seqlen_k=draw(st.sampled_from([1, 127, 128, 129, 257, 300, 513])),
        head_dim=draw(st.sampled_from([16, 40, 64, 128])),
        head_dim_v=draw(st.sampled_from([None, None, 16, 128])),
        mask=draw(st.sampled_from(MASKS)),
        dtype=draw(st.sampled_from(["fp16", "bf16"])),
        direction=draw(st.sampled_from(["fwd", "bwd"])),
        dropout=draw(st.sampled_from([0.0, 0.1, 0.17])),
    )


@given(
    problems(),
    st.sampled_from(BUILDS),
    st.sampled_from(["a100-sxm4-80gb", "l4", "h100-sxm5"]),
    st.sampled_from([True, "dtype"]),
)
@settings(max_examples=max(1, settings().max_examples // 4), deadline=None)
# Queries that see one key of the first block and more of the second one, where scores larger than L_i are to be found.
@example(problem(seqlen_q=300, mask="documents:255+45"), "2022-05", "a100-sxm4-80gb", True)
@example(problem(seqlen_q=67, seqlen_k=513, mask="causal", direction="bwd"), "2022-05", "a100-sxm4-80gb", True)
@example(problem(seqlen_q=67, seqlen_k=300, direction="bwd", dropout=0.1), "paper", "a100-sxm4-80gb", "dtype")
@example(problem(seqlen_q=300, seqlen_k=129, mask="causal", head_dim=128), "2022-05", "l4", True)
@example(problem(seqlen_q=16, seqlen_k=300, mask="padding:0", direction="bwd"), "2022-05", "h100-sxm5", True)
def test_exact(p: AttentionProblem, build: str, gpu: str, functional: Any) -> None:
    found = simulate(p, "fa1", with_sms(gpu, 1), options={"build": build}, functional=functional).functional
    assert found is not None
    assert found.accepted


def without_barrier(module: ModuleType, number: int, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with one of its barriers left out."""
    wait = "yield s.everybody.wait()"
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    pieces = text.split(wait)
    changed = ModuleType(f"{module.__name__}_without_barrier_{number}")
    changed.__file__ = module.__file__
    monkeypatch.setitem(sys.modules, changed.__name__, changed)
    source = wait.join(pieces[: number + 1]) + "pass" + wait.join(pieces[number + 1 :])
    exec(compile(source, str(module.__file__), "exec"), changed.__dict__)
    return changed


@pytest.mark.parametrize("number", range(4))
def test_every_barrier_of_the_forward_pass_is_needed(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a warp touches what another one has not finished with. O is exchanged in parts here."""
    p = problem(seqlen_q=160, seqlen_k=150, head_dim=128)
    changed = without_barrier(fa1, number, monkeypatch)
    with pytest.raises(Race):
        simulate(p, changed.FA1, with_sms("a100-sxm4-80gb", 1), options={"build": "paper"}, functional=True)


@pytest.mark.parametrize("number", range(3))
def test_every_barrier_of_the_backward_pass_is_needed(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(seqlen_q=48, seqlen_k=150, head_dim=128, direction="bwd")
    changed = without_barrier(fa1_backward, number, monkeypatch)
    monkeypatch.setattr(FA1, "backward", changed.FA1Backward)
    with pytest.raises(Race):
        simulate(p, FA1, with_sms("a100-sxm4-80gb", 1), functional=True)


@pytest.mark.parametrize(
    ("build", "fields", "tiles"),
    [
        ("paper", {}, (64, 192, 64, 192)),
        ("paper", {"head_dim": 32}, (32, 384, 32, 384)),
        ("paper", {"dropout": 0.1}, (64, 192, 64, 64)),
        ("2022-05", {}, (16, 256, 16, 256)),
        ("2022-05", {"seqlen_k": 128}, (16, 128, 16, 128)),
        ("2022-05", {"head_dim": 128}, (16, 128, 16, 128)),
    ],
)
def test_tiles(build: str, fields: dict[str, Any], tiles: tuple[int, ...]) -> None:
    chosen = FA1.configure(problem(**{"seqlen_k": 1024} | fields), "ampere", {"build": build})
    assert (chosen.BLOCK_M, chosen.BLOCK_N, chosen.bwd_BLOCK_M, chosen.bwd_BLOCK_N) == tiles


@pytest.mark.parametrize("architecture", ["a100-sxm4-80gb", "l4", "h100-sxm5"])
def test_default_tiles_fit(architecture: str) -> None:
    device = load_device(architecture)
    for build in BUILDS:
        for head_dim in range(8, 136, 8):
            for dropout in (0.0, 0.1):
                p = problem(seqlen_k=1024, head_dim=head_dim, dropout=dropout, direction="fwd+bwd")
                for kernel in FA1.configure(p, device.architecture, {"build": build}).kernels(p):
                    assert fit(kernel, p, device).ctas_per_sm >= 1


def test_the_code_holds_two_ctas_on_an_sm_forward_and_one_backward() -> None:
    p = problem(seqlen_k=1024, direction="fwd+bwd")
    device = load_device("a100-sxm4-40gb")
    kernels = {kernel.name: kernel for kernel in FA1.configure(p, "ampere", {}).kernels(p)}
    assert [fit(kernels[name], p, device).ctas_per_sm for name in ("fa1_fwd", "fa1_bwd")] == [2, 1]


def test_one_block_of_keys_needs_no_workspace() -> None:
    one, two = (problem(seqlen_k=seqlen_k, direction="fwd+bwd") for seqlen_k in (256, 257))
    rows = 64
    assert FA1.configure(one, "ampere", {}).workspace_byte(one) == 0
    assert FA1.configure(two, "ampere", {}).workspace_byte(two) == 4 * rows * (64 + 1)  # dQ_tmp, D; O_tmp is dead
    padded = problem(seqlen_k=256, direction="fwd+bwd", mask="padding")
    q, k, v = (padded.tensor_bytes[name] for name in ("q", "k", "v"))
    assert FA1.configure(padded, "ampere", {}).workspace_byte(padded) == q + k + v
    assert [kernel.name for kernel in FA1.configure(one, "ampere", {}).kernels(one)] == ["fa1_fwd", "fa1_bwd"]


def test_what_does_not_go_together() -> None:
    with pytest.raises(InputError) as error:
        FA1.configure(problem(head_dim=136), "ampere", {"BLOCK_N": 100})
    assert error.value.problems == (
        "schedule fa1: head_dim = 136, the kernels end at 128",
        "schedule fa1: head_dim_v = 136, the kernels end at 128",
        "schedule fa1: BLOCK_N = 100, must be a multiple of 64: whole MMAs for every warp",
    )


@pytest.mark.parametrize(
    ("mask", "alike"),
    [("full", True), ("causal", True), ("window:70,10", False), ("documents:128+172", False), ("padding:0", False)],
)
def test_which_masks_let_all_queries_begin_with_the_same_keys(mask: str, alike: bool) -> None:
    assert begins_alike(problem(seqlen_q=300, mask=mask), 16, 128) is alike


def test_queries_before_all_keys_begin_with_none() -> None:
    assert not begins_alike(problem(seqlen_q=300, seqlen_k=100, mask="causal"), 16, 128)


def test_one_cta_for_each_head() -> None:
    """So four heads take as long as one, if there are four SMs, and eight heads twice as long backward."""
    device = with_sms("a100-sxm4-80gb", 4)
    device = dataclasses.replace(device, memory=dataclasses.replace(device.memory, l2_share_byte=1 << 30))
    ticks = {}
    for heads in (1, 4, 8):
        p = problem(heads_q=heads, seqlen_q=128, seqlen_k=256, direction="bwd")
        ticks[heads] = simulate(p, FA1, device, full=True).ticks
    assert ticks[4] == pytest.approx(ticks[1], rel=0.02)
    launch = 1.35 * 1410 * 256
    assert ticks[8] - launch == pytest.approx(2 * (ticks[4] - launch), rel=0.1)


@pytest.mark.parametrize(("direction", "events"), [("fwd", 3050), ("bwd", 10093)])
def test_events_of_a_small_case(direction: str, events: int) -> None:
    """Events are the cost of an answer: who changes how many a step takes changes this number, and says why."""
    p = problem(seqlen_q=128, seqlen_k=512, direction=direction)
    assert simulate(p, FA1, with_sms("a100-sxm4-80gb", 1), full=True).events == events


def test_dropout_costs_integer_work() -> None:
    """Philox: `DROPOUT_INSTRUCTIONS` a score, in the ALU pipe."""
    device = with_sms("a100-sxm4-80gb", 1)
    busy = []
    for dropout in (0.0, 0.1):
        result = simulate(problem(seqlen_k=256, dropout=dropout), FA1, device, full=True)
        busy.append(result.utilization["alu"].elapsed * result.ticks / 256)
    assert busy[1] - busy[0] == pytest.approx(DROPOUT_INSTRUCTIONS * 64 * 256 / device.pipes.alu_op_per_clk)


# What the machine needs for it.


def test_operands_in_registers_take_no_port() -> None:
    alone, four = (1, 1), (4, 1)
    _, _, none, _ = COSTS.mma_sync(16, 64, 64, (False, False), alone)
    steps, _, requests, ticks = COSTS.mma_sync(16, 64, 64, (True, False), alone)
    assert none == 0
    assert (steps, requests, ticks / 256) == (4, 1, 16 * 32 / 128)  # 16 rows x 16 elements of 2 bytes
    _, _, requests, ticks = COSTS.mma_sync(128, 64, 64, (True, True), four)
    assert requests * ticks / 256 == (128 + 4 * 64) * 32 / 128  # each warp reads all columns


def tile(shape: tuple[int, int], place: str = "registers", dtype: str = "fp32") -> View:
    return Buffer(f"{place} {shape}", shape, dtype, place, functional=False).whole


def test_what_other_warps_are_to_see_waits_for_the_shuffles() -> None:
    """A row sum goes on at once to the next operation of its warp, but not to shared memory."""
    S, total, column = tile((16, 64)), tile((16, 1)), tile((16, 4), "shared").columns(1, 1)
    summed = ("reduce", "sum", (S,), total)
    assert [phase.latency for phase in plan(WARP, [summed, ("map", "mul", (total, total), total)])] == [0]
    first, second = plan(WARP, [summed, ("convert", "", (total,), column)])
    assert (first.latency, second.latency) == (COSTS.row_reduce, COSTS.smem_latency)
    assert second.work == {"smem": COSTS.smem(16 * 4)}


def test_what_is_read_from_shared_memory_is_there_after_its_latency() -> None:
    S, maxima, m = tile((16, 64)), tile((16, 5), "shared"), tile((16, 1))
    fetch, use = plan(WARP, [("reduce", "max", (maxima,), m), ("map", "exp", (S, m), S)])
    assert (fetch.work, fetch.latency) == ({"smem": COSTS.smem(16 * 5 * 4)}, COSTS.smem_latency)
    assert (use.exp, use.latency) == (16 * 64 * 256 // 16, 0)  # no shuffles: each thread has read its whole row


def test_only_what_becomes_narrower_is_packed() -> None:
    wide, narrow = tile((16, 64)), tile((16, 64), dtype="fp16")
    assert plan(WARP, [("convert", "", (wide,), tile((16, 64)))]) == []
    (packed,) = plan(WARP, [("convert", "", (wide,), narrow)])
    assert "pack" in packed.work
    (copied,) = plan(WARP, [("convert", "", (tile((16, 64), "shared", "fp16"),), narrow)])
    assert copied.work == {"smem": COSTS.smem(16 * 64 * 2)}


def test_wgmma_reads_its_second_operand_from_shared_memory() -> None:
    a, b, into = tile((64, 16), "shared", "fp16"), tile((16, 64), dtype="fp16"), tile((64, 64))
    with pytest.raises(SimulationError, match="by wgmma reads its second operand from shared memory, got registers"):
        AsyncProduct(a, b, into, Completion(Simulation(), ""), None)
