"""Which tiles fit an SM, how often, and what is said of those that do not. Bytes and registers are counted by hand."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest

from flashsim.devices import DeviceSpec, load_device
from flashsim.errors import Infeasible, InputError
from flashsim.machine.feasibility import Fit, fit
from flashsim.problem import AttentionProblem
from flashsim.schedules import load_schedule
from flashsim.simulate import simulate


def fitted(
    schedule: str, head_dim: int, mask: str = "full", gpu: str | DeviceSpec = "h100-sxm5", **options: Any
) -> tuple[tuple[int, int], Fit]:
    """(tile, how it fits) of the schedule's kernel."""
    device = gpu if isinstance(gpu, DeviceSpec) else load_device(gpu)
    problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=4096, head_dim=head_dim, mask=mask)
    (kernel,) = load_schedule(schedule).configure(problem, device.architecture, options).kernels(problem)
    return (kernel.BLOCK_M, kernel.BLOCK_N), fit(kernel, problem, device)


# What the libraries ship.


@pytest.mark.parametrize(
    ("build", "head_dim", "mask", "tile"),
    [
        ("2024-07", 64, "full", (192, 128)),
        ("2024-07", 64, "causal", (192, 128)),
        ("2024-07", 128, "full", (128, 176)),
        ("2024-07", 128, "causal", (128, 128)),
        ("2024-07", 256, "full", (128, 80)),
        ("2025-01", 64, "full", (192, 192)),
        ("2025-01", 64, "causal", (192, 128)),
        ("2025-01", 96, "full", (192, 144)),
        ("2025-01", 96, "causal", (192, 128)),
        ("2025-01", 128, "full", (128, 176)),
        ("2025-01", 128, "causal", (128, 128)),
        ("2025-01", 192, "full", (128, 112)),
        ("2025-01", 256, "causal", (128, 80)),
    ],
)
def test_tiles_that_fa3_ships_fit_once(build: str, head_dim: int, mask: str, tile: tuple[int, int]) -> None:
    """hopper/tile_size.h; one CTA of FA3 fills an SM."""
    chosen, how = fitted("fa3", head_dim, mask, build=build)
    assert chosen == tile
    assert how.ctas_per_sm == 1


@pytest.mark.parametrize(
    ("gpu", "head_dim", "tile", "ctas"),
    [
        ("a100-sxm4-80gb", 64, (128, 128), 2),
        ("a100-sxm4-80gb", 128, (128, 64), 2),
        ("a100-sxm4-80gb", 256, (128, 64), 1),
        ("h100-sxm5", 64, (128, 128), 2),
        ("h100-sxm5", 128, (128, 64), 2),
        ("h100-sxm5", 256, (64, 64), 2),
        ("l4", 64, (128, 128), 2),
        ("l4", 128, (128, 32), 2),
    ],
)
def test_tiles_that_fa2_ships_fit_as_often_as_they_do(
    gpu: str, head_dim: int, tile: tuple[int, int], ctas: int
) -> None:
    chosen, how = fitted("fa2", head_dim, gpu=gpu)
    assert chosen == tile
    assert how.ctas_per_sm == ctas


# By hand.


def test_what_a_cta_of_fa3_takes() -> None:
    """Head dim 128, 128 x 176: Q 128 x 128, two slots each of K and V of 176 x 128, all 2 bytes; O lies over V.

    A ring's slot has two mbarriers of 8 bytes. A consumer's thread holds 64 x 176 / 128 = 88 values of S, half as many
    registers of P, 64 x 128 / 128 = 64 of O, and 24 others.
    """
    q, kv = 128 * 128 * 2 + 16, 2 * (176 * 128 * 2 + 16)
    _, how = fitted("fa3", 128)
    assert how.smem_byte == q + kv + kv + 16 == 213_088
    assert how.registers_per_thread == {"producer": 24, "consumer": 88 + 44 + 64 + 24}


def test_what_a_cta_of_fa3_takes_with_p_in_shared_memory() -> None:
    """Head dim 64, 192 x 192, P through shared memory: 64 x 192 for each of three consumers, and no registers."""
    q, kv, p = 192 * 64 * 2 + 16, 2 * (192 * 64 * 2 + 16), 3 * 64 * 192 * 2
    _, how = fitted("fa3", 64)
    assert how.smem_byte == q + kv + kv + p + 16 == 196_704
    assert how.registers_per_thread["consumer"] == 64 * 192 // 128 + 64 * 64 // 128 + 24 == 152


def test_o_takes_what_does_not_lie_over_v() -> None:
    """One slot of V of 16 x 64 is smaller than O of 192 x 64."""
    _, how = fitted("fa3", 64, BLOCK_M=192, BLOCK_N=16, num_stages=1, P_in_shared=False)
    q, kv, o = 192 * 64 * 2 + 16, 16 * 64 * 2 + 16, 192 * 64 * 2
    assert how.smem_byte == q + kv + kv + (o - kv) + 16


def test_what_a_cta_of_fa2_takes() -> None:
    """Head dim 64, 128 x 128, four warps: a thread holds 128 values of S, whose registers P takes over, and 64 of O."""
    _, how = fitted("fa2", 64, gpu="a100-sxm4-80gb")
    assert how.smem_byte == (128 + 128 + 128) * 64 * 2 == 49_152
    assert how.registers_per_thread == {"warps": 128 + 64 + 24}


def test_occupancy_of_fa2_on_a100() -> None:
    """Two CTAs, once for want of registers (4 x 27 x 256 of 65536 each), once of shared memory (66560 of 167936)."""
    assert fitted("fa2", 64, gpu="a100-sxm4-80gb")[1].limited_by == "registers"
    assert 65_536 // (4 * 27 * 256) == 2
    assert fitted("fa2", 128, gpu="a100-sxm4-80gb")[1].limited_by == "shared memory"
    assert 167_936 // (65_536 + 1024) == 2


def test_a_kernel_that_moves_registers_between_roles_takes_the_limits() -> None:
    """Three consumers with 160 and a producer with 32, setmaxnreg's sum, are the whole register file."""
    _, how = fitted("fa3", 64, "causal")
    assert (3 * 160 + 32) * 128 == 65_536
    assert (how.ctas_per_sm, how.limited_by) == (1, "registers")


def test_a_smaller_tile_fits_more_often() -> None:
    _, how = fitted("fa2", 64, gpu="a100-sxm4-80gb", BLOCK_M=64, BLOCK_N=64)
    # S 32 + O 32 + 24 = 88 registers, 11 units of 256 for a warp; 24 KiB + 1 KiB of shared memory.
    assert how.registers_per_thread == {"warps": 64 * 64 // 128 + 64 * 64 // 128 + 24}
    assert how.ctas_per_sm == min(65_536 // (4 * 11 * 256), 167_936 // (24_576 + 1024)) == 5


# What does not fit.


@pytest.mark.parametrize(
    ("head_dim", "mask", "BLOCK_N", "needs"),
    [
        (64, "causal", 144, 72 + 36 + 32 + 24),
        (64, "full", 224, 112 + 32 + 24),
    ],
)
def test_a_tile_that_needs_too_many_registers(head_dim: int, mask: str, BLOCK_N: int, needs: int) -> None:
    with pytest.raises(Infeasible) as refused:
        fitted("fa3", head_dim, mask, BLOCK_N=BLOCK_N)
    assert refused.value.problems == (
        f"fa3_fwd with BLOCK_M = 192, BLOCK_N = {BLOCK_N} needs {needs} registers per thread of a consumer "
        "(24 of them beside its tiles), the limit is 160",
    )


@pytest.mark.parametrize(("head_dim", "BLOCK_N"), [(128, 208), (192, 128), (256, 96)])
def test_a_tile_that_needs_too_much_shared_memory(head_dim: int, BLOCK_N: int) -> None:
    q, kv = 128 * head_dim * 2 + 16, 2 * (BLOCK_N * head_dim * 2 + 16)
    with pytest.raises(Infeasible) as refused:
        fitted("fa3", head_dim, BLOCK_N=BLOCK_N)
    assert (
        f"fa3_fwd with BLOCK_M = 128, BLOCK_N = {BLOCK_N} needs {q + 2 * kv + 16} bytes of shared memory "
        f"(V {kv}, Q {q}, K {kv}, O 16), h100-sxm5 has 232448 for a CTA"
    ) in refused.value.problems


def test_the_tile_between_is_at_the_limit_of_shared_memory() -> None:
    """128 x 192 at head dim 128 takes 224 of 227 KiB for its tiles; it was not chosen, but it fits."""
    _, how = fitted("fa3", 128, BLOCK_N=192)
    assert how.smem_byte == 224 * 1024 + 6 * 16


def test_all_reasons_come_at_once() -> None:
    with pytest.raises(Infeasible) as refused:
        fitted("fa3", 192, BLOCK_M=192)
    memory, registers = refused.value.problems
    assert "245856 bytes of shared memory" in memory
    assert "204 registers per thread of a consumer" in registers


def test_a_cta_that_is_too_large_as_a_whole() -> None:
    """Each thread has its registers, but sixteen warps together have too many."""
    with pytest.raises(Infeasible, match="fa2_fwd: a CTA takes 77824 registers and 16 warps, too many for registers"):
        fitted("fa2", 192, gpu="a100-sxm4-80gb", BLOCK_M=256)


def test_more_stages_take_more_memory_until_they_do_not_fit() -> None:
    """From two stages on V is larger than O, and each more takes a slot of K and one of V."""
    taken = [fitted("fa3", 64, "causal", num_stages=stages)[1].smem_byte for stages in (2, 3, 4, 5, 6)]
    assert {more - less for less, more in pairwise(taken)} == {2 * (128 * 64 * 2 + 16)}
    with pytest.raises(Infeasible, match=f"needs {taken[-1] + 2 * (128 * 64 * 2 + 16)} bytes of shared memory"):
        fitted("fa3", 64, "causal", num_stages=7)


# What a device has not.


def test_l4_refuses_fa3_by_its_architecture() -> None:
    with pytest.raises(InputError) as refused:
        simulate(AttentionProblem(batch=1, heads_q=1, seqlen_q=64, head_dim=64), "fa3", "l4")
    assert refused.value.problems == ("schedule fa3 does not run on ada (it runs on: hopper)",)


def test_a_hopper_without_wgmma_and_tma_is_told_what_it_lacks() -> None:
    device = dataclasses.replace(load_device("h100-sxm5"), name="mine", wgmma=None, tma=None)
    with pytest.raises(Infeasible) as refused:
        fitted("fa3", 128, gpu=device)
    assert refused.value.problems == (
        "fa3_fwd needs wgmma, which mine (hopper) has not",
        "fa3_fwd needs tma, which mine (hopper) has not",
    )


def test_what_does_not_fit_is_refused_before_anything_is_simulated() -> None:
    problem = AttentionProblem(batch=1, heads_q=1, seqlen_q=64, head_dim=512)
    for functional in (False, True):
        with pytest.raises(Infeasible, match="bytes of shared memory"):
            simulate(problem, "fa3", functional=functional)
