"""`impl`: a schedule with the tiles, and where it differs the loop, of one of the kernels in `flashsim_kernels`."""

from __future__ import annotations

import tomllib
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from flashsim.devices import load_device
from flashsim.errors import InputError, Race
from flashsim.problem import AttentionProblem
from flashsim.schedules.fa2 import FA2
from flashsim.schedules.fa2_backward_triton import FA2BackwardTriton
from flashsim.schedules.fa2_triton import FA2Triton
from flashsim.schedules.fa3 import FA3
from flashsim.schedules.launch import launch_parameters
from flashsim.simulate import configured, simulate

KERNELS = Path(__file__).parents[2] / "kernels"


def problem(seqlen: int = 300, head_dim: int = 64, **others: Any) -> AttentionProblem:
    sizes = {"batch": 1, "heads_q": 2, "heads_kv": 1, "seqlen_q": seqlen, "head_dim": head_dim}
    return AttentionProblem(**sizes | others)


def rows_of(implementation: str, kernel: str) -> list[dict[str, Any]]:
    return tomllib.loads((KERNELS / f"{implementation}.toml").read_text(encoding="utf-8"))[kernel]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("gpu", ["a100-sxm4-80gb", "h100-sxm5"])
def test_fa2_of_triton_is_exact(gpu: str, mask: str, num_stages: int) -> None:
    options = {"impl": "triton", "BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": num_stages}
    found = simulate(problem(mask=mask), "fa2", gpu, options=options, functional=True).functional
    assert found is not None
    assert found.accepted
    assert found.max_abs_error < 1e-14


def test_on_hopper_triton_multiplies_by_wgmma() -> None:
    mma = {
        (gpu, impl): configured(FA2, problem(), load_device(gpu), {"impl": impl}).options()["mma"]
        for gpu, impl in product(("a100-sxm4-80gb", "h100-sxm5"), ("published", "triton"))
    }
    assert mma == {
        ("a100-sxm4-80gb", "published"): "mma.sync",
        ("a100-sxm4-80gb", "triton"): "mma.sync",
        ("h100-sxm5", "published"): "mma.sync",
        ("h100-sxm5", "triton"): "wgmma",
    }


def test_wgmma_is_faster_than_mma_sync() -> None:
    long = problem(seqlen=4096, head_dim=128, heads_q=16, heads_kv=16)
    slow, fast = (simulate(long, "fa2", options={"mma": mma}).time_us for mma in ("mma.sync", "wgmma"))
    assert fast < 0.8 * slow


@pytest.mark.parametrize("mma", ["mma.sync", "wgmma"])
def test_one_buffer_less_is_a_race(mma: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many buffers as the compiler gives are needed: a load would overwrite what a product reads."""
    options = {"impl": "triton", "BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3, "mma": mma}
    simulate(problem(), "fa2", options=options, functional=True)
    buffers = FA2Triton.buffers.fget
    assert buffers is not None
    monkeypatch.setattr(FA2Triton, "buffers", property(lambda self: buffers(self) - 1))
    with pytest.raises(Race, match=r"race on [KV]\[\d\]"):
        simulate(problem(), "fa2", options=options, functional=True)


@pytest.mark.parametrize("gpu", ["a100-sxm4-80gb", "h100-sxm5"])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_the_fast_path_is_right_for_it(gpu: str, num_stages: int) -> None:
    """Four work tiles an SM of a small device, in full and by what is alike."""
    from dataclasses import replace

    device = load_device(gpu)
    small = replace(device, sm=replace(device.sm, count=4))
    p = problem(seqlen=2048, head_dim=128)
    options = {"impl": "triton", "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": num_stages}
    fast, full = (simulate(p, "fa2", small, options=options, full=full).time_us for full in (False, True))
    assert fast == pytest.approx(full, rel=0.02)


@pytest.mark.parametrize(("impl", "kernel"), [("gluon", "fa3_fwd"), ("triton", "fa3_triton_fwd")])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_fa3_takes_tiles_and_switches_from_the_launch_table(impl: str, kernel: str, head_dim: int) -> None:
    device = load_device("h100-sxm5")
    p = problem(head_dim=head_dim)
    row = launch_parameters(impl, kernel, p, "hopper")
    options = configured(FA3, p, device, {"impl": impl}).options()
    assert {"BLOCK_M", "BLOCK_N"} <= set(row)
    assert {name: options[name] for name in row if name in options} == {n: v for n, v in row.items() if n in options}
    found = simulate(p, "fa3", device, options={"impl": impl}, functional=True).functional
    assert found is not None
    assert found.accepted


def test_every_row_of_fa2_can_be_simulated() -> None:
    gpus = {"ampere": "a100-sxm4-80gb", "ada": "l4", "hopper": "h100-sxm5"}
    rows = [row for row in rows_of("triton", "fa2_fwd") if row.get("dtype", "fp16") == "fp16"]
    tried = 0
    for row in rows:
        for arch, gpu in gpus.items():
            if row.get("arch", arch) == arch:
                p = problem(seqlen=512, head_dim=min(row.get("head_dim", 256), 256))
                assert simulate(p, "fa2", gpu, options={"impl": "triton"}).time_us > 0
                tried += 1
    assert tried >= len(rows) - sum(row.get("arch") == "blackwell" for row in rows)


@pytest.mark.parametrize("gpu", ["a100-sxm4-80gb", "l4", "h100-sxm5"])
@pytest.mark.parametrize("mask", ["full", "causal", "window:40,10"])
@pytest.mark.parametrize("schedule", ["standard", "fa1", "fa2", "split_kv"])
def test_kernels_of_triton_are_exact(schedule: str, mask: str, gpu: str) -> None:
    p = problem(seqlen=150, seqlen_k=200, mask=mask, head_dim_v=40)
    found = simulate(p, schedule, gpu, options={"impl": "triton"}, functional=True).functional
    assert found is not None
    assert found.accepted
    assert found.max_abs_error < 1e-14


@pytest.mark.parametrize("gpu", ["a100-sxm4-80gb", "h100-sxm5"])
@pytest.mark.parametrize("mask", ["full", "causal", "window:40,10"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_triton_are_exact(gpu: str, mask: str, deterministic: bool) -> None:
    options = {"impl": "triton", "deterministic": deterministic}
    result = simulate(problem(150, mask=mask, direction="bwd"), "fa2", gpu, options=options, functional=True)
    found = result.functional
    assert found is not None
    assert found.accepted
    assert found.gradient_max_abs_error is not None
    assert max(found.gradient_max_abs_error.values()) < 1e-13
    names = [kernel.name for kernel in result.kernels]
    assert ("fa2_bwd_dq" in names, "fa2_bwd_convert_dq" in names) == (deterministic, not deterministic)


def test_standard_attention_of_triton_has_three_kernels() -> None:
    result = simulate(problem(mask="causal"), "standard", options={"impl": "triton"})
    assert [kernel.name for kernel in result.kernels] == ["standard_scores", "standard_softmax", "standard_output"]


@pytest.mark.parametrize(
    ("schedule", "options", "line"),
    [
        ("fa2", {"impl": "gluon"}, "switch impl of fa2: unknown value 'gluon'"),
        ("fa2", {"impl": "triton", "BLOCK_N": 48}, "BLOCK_N = 48, must be a power of two"),
        ("fa2", {"impl": "triton", "num_stages": 9}, "num_stages = 9, allowed are 2 to 8"),
        ("fa1", {"num_warps": 8}, "mma = mma.sync, num_warps = 8: the published kernel has mma.sync and 4"),
        ("fa1", {"impl": "triton", "BLOCK_M": 48}, "BLOCK_M = 48, must be a power of two"),
        ("fa1", {"impl": "triton", "BLOCK_M": 32}, "BLOCK_M = 32, must be a multiple of 64"),
        ("split_kv", {"impl": "triton", "kv_dtype": "fp8"}, "impl = triton has K and V in the problem's dtype"),
        ("fa2", {"num_stages": 2}, "the published kernel has one buffer of K and one of V"),
        ("fa2", {"num_warps": 8, "BLOCK_M": 64}, "num_warps = 8, allowed are 4, 8 and 16, each with"),
    ],
)
def test_what_impl_cannot_be(schedule: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        simulate(problem(), schedule, options=options)
    assert any(line in found for found in error.value.problems)


@pytest.mark.parametrize(
    ("schedule", "impl"), [("fa3", "gluon"), ("fa3", "triton"), ("fa1", "triton"), ("standard", "triton")]
)
def test_their_gradients_come_from_fa2(schedule: str, impl: str) -> None:
    with pytest.raises(InputError, match="gradients come from fa2"):
        simulate(problem(direction="bwd"), schedule, options={"impl": impl})


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_tile_of_a_deterministic_dq_is_that_of_the_launch_table(head_dim: int) -> None:
    row = launch_parameters("triton", "fa2_bwd_dq", problem(head_dim=head_dim), "hopper")
    kernel = FA2BackwardTriton(64, 128, 1, True, head_dim, head_dim, "wgmma")
    assert kernel.dq_tile == (row["BLOCK_M"], row["BLOCK_N"], row["num_warps"] // 4)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_wide_heads_are_refused(deterministic: bool) -> None:
    options = {"impl": "triton", "deterministic": deterministic}
    with pytest.raises(InputError, match="must give each of 8 warps 16 keys"):
        simulate(problem(head_dim=256, direction="bwd"), "fa2", options=options)
